"""Which implementation of the layers a test runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

from fedkn.layers import circumstances
from fedkn.layers.native import library

PATHS = ("plain", "native", "composite")


@contextmanager
def path(name: str) -> Iterator[None]:
    """Run the block on the named implementation; skip the test where it cannot be had."""
    if name == "native" and not library.load():
        possible = library.wished() != "0" and library.compiler() is not None
        assert not possible, "the fused CPU kernels were not built, or not loaded: see the warning"
        pytest.skip(
            "the fused CPU kernels cannot be built here (no C++ compiler, or FEDKN_NATIVE=0)"
        )
    if name == "composite":
        with mock.patch.object(circumstances, "eager", return_value=False):
            yield
    else:
        with mock.patch.object(library, "load", return_value=name == "native"):
            yield
