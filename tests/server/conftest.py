"""What tests of several folders below need."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.server.fake_grid import ScriptedGrid


@pytest.fixture(scope="module")
def server_process() -> Iterator[None]:
    """This process is a server's.

    Some of Flower's strategies collect garbage for every update, which takes long in a process
    that has imported as much as a test run.
    """
    ScriptedGrid([], lambda message: [])
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
