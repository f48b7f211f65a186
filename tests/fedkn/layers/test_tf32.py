from __future__ import annotations

import pytest
import torch

from fedkn.layers import tf32
from server.observers.untouched import untouched

backends = torch.backends
NEW = hasattr(backends, "fp32_precision")


def _by_new(place, value):
    return pytest.param(
        lambda: setattr(place(), "fp32_precision", value),
        marks=pytest.mark.skipif(not NEW, reason="this PyTorch has one kind of switch"),
    )


CHANGES = [
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: setattr(backends.cudnn, "allow_tf32", not backends.cudnn.allow_tf32),
    _by_new(lambda: backends, "tf32"),
    _by_new(lambda: backends.cudnn, "tf32"),
    _by_new(lambda: backends.cudnn.conv, "ieee"),
    _by_new(lambda: backends.cuda.matmul, "tf32"),
    _by_new(lambda: backends.mkldnn, "bf16"),
]


@pytest.fixture(autouse=True)
def _unchanged():
    before = tf32.switches()
    yield
    tf32.put_back(before)
    assert tf32.switches() == before


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_was_set_is_put_back(change):
    before = tf32.switches()
    change()
    assert tf32.switches() != before
    tf32.put_back(before)
    assert tf32.switches() == before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_taken_and_left_whoever_set_what(change, on):
    change()
    tf32.take_tf32(on)
    assert tf32.convolutions_take_tf32() == on
    if NEW:
        assert {backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision} <= (
            {"tf32"} if on else {"ieee", "none"}
        )
    else:
        assert backends.cudnn.allow_tf32 == backends.cuda.matmul.allow_tf32 == on


@pytest.mark.parametrize("change", CHANGES)
def test_an_observer_may_set_any_of_them_before_and_during_a_run(change):
    change()
    before = tf32.switches()
    with untouched():
        torch.set_float32_matmul_precision("high")
        if NEW:
            backends.fp32_precision = "tf32"
    # Those that can be asked for: what can be asked where it could not is no harm.
    new, old = tf32.switches()
    assert new == before[0]
    assert all(was in (None, now) for was, now in zip(before[1], old, strict=True))
