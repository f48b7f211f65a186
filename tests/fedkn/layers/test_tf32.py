from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


SETTERS = [
    *(
        lambda value=value: torch.set_float32_matmul_precision(value)
        for value in ("medium", "high")
    ),
    *(
        lambda owner=owner, on=on: setattr(owner, "allow_tf32", on)
        for owner in (backends.cudnn, backends.cuda.matmul)
        for on in (True, False)
    ),
    *(lambda on=on: tf32.take_tf32(on) for on in (True, False)),
]
if NEW:
    SETTERS += [
        lambda place=place, value=value: setattr(place, "fp32_precision", value)
        for place in (
            *(backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn),
            backends.cuda.matmul,
        )
        for value in ("tf32", "ieee", "none")
    ]


# What an earlier setting left where nobody can ask for it decides how a later one is taken.
@given(setters=st.lists(st.sampled_from(SETTERS), max_size=5), on=st.booleans())
def test_tf32_is_taken_and_left_and_put_back_after_any_settings(setters, on):
    start = tf32.switches()
    for setter in setters:
        setter()
    before = tf32.switches()
    tf32.take_tf32(on)
    assert tf32.convolutions_take_tf32() == on
    if NEW:
        places = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
        assert {place.fp32_precision == "tf32" for place in places} == {on}
    else:
        assert backends.cudnn.allow_tf32 == backends.cuda.matmul.allow_tf32 == on
    tf32.put_back(before)
    assert tf32.switches() == before
    tf32.put_back(start)
    assert tf32.switches() == start


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
