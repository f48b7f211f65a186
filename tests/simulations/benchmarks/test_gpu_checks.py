"""What `fedkn bench gpu --part checks` asks of a device, of one that is not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedkn.layers import triton_switch
from simulations.benchmarks.gpu.checks import CheckCase, check_normalizer
from simulations.benchmarks.gpu.device import Gpu
from tests.pretended_gpu import pretended_gpu


@pytest.fixture(autouse=True)
def no_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FEDKN_TRITON", "0")
    triton_switch.load.cache_clear()
    yield
    triton_switch.load.cache_clear()


@pytest.mark.parametrize("name", ["kernel", "batch"])
def test_steps_are_recorded_and_nothing_waits_in_a_round(name: str) -> None:
    with pretended_gpu() as gpu:
        check = check_normalizer(CheckCase(name, 4, 8), Gpu("cuda"))
    assert (check.recorded, check.why_not, check.waits) == (True, "", "")
    assert check.repeats
    assert check.concurrent
    assert check.difference < 1e-4
    assert gpu.order.races == {}
