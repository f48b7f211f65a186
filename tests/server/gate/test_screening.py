from __future__ import annotations

import contextlib
import math
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.config import TrainConfig
from fedkn.federation import TRAIN_METRICS, arrays_record, packed
from server.gate.screening import RefusedUpdate, Screen
from tests.server.fake_grid import ScriptedGrid
from tests.server.faults import FAULTS, spoiled

SENT = {
    "conv.weight": np.linspace(-1, 1, 54, dtype=np.float32).reshape(2, 3, 3, 3),
    "norm.weight": np.ones(2, np.float32),
    "fc.weight": np.ones((5, 2), np.float32),
    "scale": np.array(0.5, np.float32),
    "nothing": np.zeros((0, 4), np.float32),
    "mask": np.array([1, 2, 3], np.int64),
}
METRICS = dict(zip(TRAIN_METRICS, (3, 40, 40, 20, 0, 0, 1.25, 0.1, 0, 0.0, 0, 0), strict=True))


@pytest.fixture(scope="module", autouse=True)
def _server_process():
    ScriptedGrid([], lambda message: [])


def request() -> Message:
    message = Message(RecordDict(), dst_node_id=8, message_type="train")
    message.metadata.__dict__["_message_id"] = "m"
    return message


def honest(arrays: dict[str, np.ndarray] | None = None) -> Message:
    content = {
        "arrays": arrays_record(SENT if arrays is None else arrays),
        "metrics": MetricRecord(METRICS),
    }
    return Message(RecordDict(content), reply_to=request())


def screen(max_norm: float = 0.0) -> Screen:
    return Screen(SENT, {3: 40, 4: 41}, TrainConfig(local_epochs=2), max_norm=max_norm)


def test_an_honest_update_passes_unchanged():
    moved = {name: (value + 1).astype(value.dtype) for name, value in SENT.items()}
    update = screen().check(honest(moved))
    assert update.partition == 3
    assert update.metrics == METRICS
    assert list(update.arrays) == list(SENT)
    for name, value in moved.items():
        assert update.arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(update.arrays[name], value)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_refused_with_its_reason(fault):
    with pytest.raises(RefusedUpdate, match=FAULTS[fault][1]):
        screen(max_norm=50.0).check(spoiled(fault, honest(), request()))


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_refused_packed_as_well(fault):
    bad = spoiled(fault, honest(), request())
    if not bad.has_content() or list(bad.content.array_records) != ["arrays"]:
        pytest.skip("nothing to pack")
    bad.content["arrays"] = packed(bad.content.array_records["arrays"])
    with pytest.raises(RefusedUpdate, match=FAULTS[fault][1]):
        screen(max_norm=50.0).check(bad)


def test_a_packed_index_of_any_length_is_not_read():
    reply = honest()
    whole = packed(reply.content.array_records["arrays"])
    (name,) = whole
    index = b"[" + b'["","",[],"",0],' * 20_000
    data = len(index).to_bytes(8, "little") + index
    whole[name] = Array("uint8", (len(data),), name, data)
    reply.content["arrays"] = whole
    tracemalloc.start()
    with pytest.raises(RefusedUpdate, match=r"an index of \d+ bytes, where \d+ are expected"):
        screen().check(reply)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(data)


def test_a_packed_update_passes_unchanged_and_a_broken_one_does_not():
    reply = honest()
    whole = packed(reply.content.array_records["arrays"])
    reply.content["arrays"] = whole
    assert fits(screen().check(reply))
    (name,) = whole
    data = whole[name].data[:-1]
    whole[name] = Array("uint8", (len(data),), name, data)
    with pytest.raises(RefusedUpdate, match="does not fit its data"):
        screen().check(reply)


@pytest.mark.parametrize("fault", ["header claims 1e11", "all claim 1e11"])
def test_a_claimed_size_is_not_allocated(fault):
    bad = spoiled(fault, honest(), request())
    tracemalloc.start()
    with pytest.raises(RefusedUpdate):
        screen().check(bad)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_an_array_in_fortran_order_is_read_as_what_it_is():
    reply = honest()
    turned = np.asfortranarray(SENT["fc.weight"] * np.arange(10).reshape(5, 2)).astype(np.float32)
    assert turned.flags.f_contiguous
    reply.content.array_records["arrays"]["fc.weight"] = Array(turned)
    np.testing.assert_array_equal(screen().check(reply).arrays["fc.weight"], turned)


def test_the_norm_bound_is_over_all_tensors_together():
    by = 0.5
    moved = {
        **SENT,
        "conv.weight": SENT["conv.weight"] + by,
        "norm.weight": SENT["norm.weight"] - by,
    }
    norm = by * 56**0.5
    screen(max_norm=norm * 1.001).check(honest(moved))
    with pytest.raises(RefusedUpdate, match=r"moves the weights by 3\.74"):
        screen(max_norm=norm * 0.999).check(honest(moved))


def test_the_declared_number_of_examples_is_per_partition():
    reply = honest()
    reply.content.metric_records["metrics"]["partition-id"] = 4
    with pytest.raises(RefusedUpdate, match="claims 40 examples, but declared 41"):
        screen().check(reply)


def fits(update) -> bool:
    return list(update.arrays) == list(SENT) and all(
        update.arrays[name].shape == value.shape
        and update.arrays[name].dtype == value.dtype
        and np.isfinite(update.arrays[name]).all()
        for name, value in SENT.items()
    )


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(sorted(SENT)),
    at=st.integers(0, 400),
    with_=st.binary(min_size=0, max_size=6),
    remove=st.integers(0, 6),
)
def test_bytes_changed_anywhere_are_read_right_or_refused(name, at, with_, remove):
    """No mutation of an array's file raises anything else, or brings anything that does not fit."""
    array = arrays_record(SENT)[name]
    data = array.data[:at] + with_ + array.data[at + remove :]
    reply = honest()
    arrays = reply.content.array_records["arrays"]
    arrays[name] = Array(array.dtype, array.shape, array.stype, data)
    with contextlib.suppress(RefusedUpdate):
        assert fits(screen().check(reply))


@settings(deadline=None, max_examples=100)
@given(
    key=st.sampled_from(TRAIN_METRICS),
    value=st.one_of(st.integers(), st.floats(), st.lists(st.floats(), max_size=2)),
)
def test_any_metric_is_plausible_or_refused(key, value):
    reply = honest()
    reply.content.metric_records["metrics"] = MetricRecord({**METRICS, key: value})
    try:
        update = screen().check(reply)
    except RefusedUpdate:
        return
    assert all(number >= 0 and math.isfinite(number) for number in update.metrics.values())
    assert update.metrics["num-examples"] == {3: 40, 4: 41}[update.partition]


@pytest.mark.parametrize("declared", [(2, 3, 3, -3), (54,), ()])
def test_a_declared_shape_that_is_odd_is_refused(declared):
    reply = honest()
    arrays = reply.content.array_records["arrays"]
    array = arrays["conv.weight"]
    arrays["conv.weight"] = Array(array.dtype, declared, array.stype, array.data)
    with pytest.raises(RefusedUpdate, match="shape"):
        screen().check(reply)


def test_a_message_without_content_is_refused():
    from flwr.app import Error

    with pytest.raises(RefusedUpdate, match="no content"):
        screen().check(Message(Error(1, "x"), reply_to=request()))


def test_records_are_not_confused():
    reply = honest()
    reply.content["arrays"] = MetricRecord(METRICS)
    with pytest.raises(RefusedUpdate, match="expected one record"):
        screen().check(reply)


def test_an_empty_array_record_is_refused():
    reply = honest()
    reply.content["arrays"] = ArrayRecord()
    with pytest.raises(RefusedUpdate, match="missing or not expected"):
        screen().check(reply)
