from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkn.data.fingerprint import Fingerprint
from fedkn.data.summary import DataSummary
from fedkn.errors import UserError
from fedkn.federation import (
    TRAIN_METRICS,
    arrays_record,
    arrays_to_tensors,
    data_record,
    is_packed,
    join_answer,
    join_request,
    on_the_wire,
    packed,
    record_bytes,
    tensors_to_arrays,
    told_data,
    unpacked,
    update_metrics,
)
from fedkn.normalizers import TensorRole
from fedkn.npy_headers import npy_header
from fedkn.training import LocalUpdate

SUMMARY = DataSummary(
    ("an ape", "ein Bär"),
    (3, 8, 6),
    (0.1, 0.2, 1 / 3),
    (0.5, 1.0, 0.25),
    Fingerprint(*["a1" * 32] * 3, (7, 0, 2), "b2" * 32, "c3" * 32),
)
DTYPES = [np.dtype(n) for n in ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")]
ARRAYS = hnp.arrays(
    st.sampled_from(DTYPES),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@settings(deadline=None)
@given(ARRAYS)
def test_the_wire_is_flowers_own(array):
    """Byte for byte what Flower's Array makes of it, so that any Flower peer reads it."""
    ours, theirs = arrays_record({"x": array})["x"], Array(np.asarray(array, order="C"))
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    assert ours.data == theirs.data
    np.testing.assert_array_equal(ours.numpy(), array)


@settings(deadline=None)
@given(ARRAYS, st.booleans())
def test_tensors_go_round(array, turned):
    tensor = torch.from_numpy(array.copy())
    if turned:
        tensor = tensor.permute(tuple(reversed(range(tensor.dim()))))
    there = tensors_to_arrays({"x": tensor})
    back = arrays_to_tensors(there)["x"]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back.isnan(), tensor.isnan())
    assert torch.equal(back.nan_to_num(), tensor.nan_to_num())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[:, ::2],
        lambda x: x.t(),
        lambda x: x.expand(3, *x.shape),
        lambda x: x.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        lambda x: x.clone().requires_grad_(),
    ],
)
def test_tensors_of_any_layout_are_sent_in_c_order(make):
    tensor = make(torch.arange(24.0).reshape(4, 6))
    record = tensors_to_arrays({"x": tensor})
    assert torch.equal(arrays_to_tensors(record)["x"], tensor)
    assert record["x"].data.endswith(tensor.detach().numpy().tobytes("C"))


def test_what_is_received_is_a_copy_of_its_own():
    tensor = torch.zeros(3)
    record = tensors_to_arrays({"x": tensor})
    tensor += 1
    first, second = arrays_to_tensors(record)["x"], arrays_to_tensors(record)["x"]
    first += 5
    assert not second.any()
    assert not arrays_to_tensors(record)["x"].any()


def test_names_keep_their_order():
    names = ["b", "a.weight", "", "c"]
    record = tensors_to_arrays({name: torch.zeros(1) for name in names})
    assert list(record) == list(arrays_to_tensors(record)) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_dtype_that_numpy_lacks_is_refused_by_name(dtype):
    with pytest.raises(UserError, match=r"'layer\.weight' is torch\..*: keep the model in float32"):
        tensors_to_arrays({"layer.weight": torch.zeros(2).to(dtype)})


def test_objects_are_not_sent():
    with pytest.raises(ValueError, match="Python objects"):
        arrays_record({"x": np.array([{}], dtype=object)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        Array(np.zeros(2, "<U3")).data,
        Array(np.zeros(2, ">f4")).data,
        npy_header(np.dtype(object), (1,)) + b"\x80\x04N.",
    ],
)
def test_what_is_no_array_of_numbers_is_refused_by_name(data):
    record = ArrayRecord({"layer.weight": Array("float32", (2,), "numpy.ndarray", data)})
    with pytest.raises(ValueError, match=r"'layer\.weight' is no array of numbers"):
        arrays_to_tensors(record)


def test_bytes_are_those_of_the_data_and_a_header_each():
    arrays = {"a": np.zeros((10, 3), np.float32), "b": np.zeros((), np.int64), "c": np.zeros(0)}
    assert record_bytes(arrays_record(arrays)) == 120 + 8 + 0 + 3 * 128
    assert record_bytes(ArrayRecord()) == 0


def test_what_travels_follows_from_the_roles():
    rule = {
        "c": TensorRole.SHARED,
        "local": TensorRole.LOCAL,
        "a": TensorRole.MEAN,
        "v": TensorRole.VARIANCE,
        "count": TensorRole.COUNTER,
        "b": TensorRole.FROZEN,
    }
    assert on_the_wire(rule) == ("c", "a", "v", "b")


def test_the_metrics_of_an_update():
    update = LocalUpdate(
        examples=44, steps=6, skipped_batches=1, skipped_examples=2, loss=0.5, seconds=1.5
    )
    record = update_metrics(7, 22, update)
    assert list(record) == list(TRAIN_METRICS)
    assert list(record.values()) == [7, 22, 44, 6, 1, 2, 0.5, 1.5, 0, 0.0, 0, 0]
    assert update_metrics(7, 22, replace(update, batch_size=2))["batch-size"] == 2
    private = replace(update, epsilon=2.5)
    spent = update_metrics(7, 22, private, state_lost=True)
    assert (spent["state-lost"], spent["epsilon"]) == (1, 2.5)


def test_joining():
    assert told_data(join_request(SUMMARY)) == SUMMARY
    assert dict(join_answer(3, 40).metric_records["metrics"]) == {
        "partition-id": 3,
        "num-examples": 40,
    }
    assert dict(join_answer(3, 40, [30, 0, 10]).metric_records["metrics"]) == {
        "partition-id": 3,
        "num-examples": 40,
        "labels": [30, 0, 10],
    }


@pytest.mark.parametrize("summary", [SUMMARY, DataSummary(("a", "b", "c"), (1, 2, 2))])
def test_what_images_are_like_survives_the_wire(summary):
    """Serialized as Flower sends it."""
    sent = ConfigRecord.inflate(data_record(summary).deflate())
    assert told_data(RecordDict({"data": sent})) == summary


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({}, "what the experiment's images are like"),
        ({"classes": ["a", "b"]}, "what the experiment's images are like"),
        ({"classes": ["a"], "shape": [1, 2, 2]}, "what the experiment's images are like"),
        ({"classes": ["a", "b"], "shape": [1, 0, 2]}, "what the experiment's images are like"),
        ({"classes": ["a", "b"], "shape": [1, 2, 2], "mean": [0.5]}, "images are like"),
        ({"classes": "ab", "shape": [1, 2, 2]}, "no list 'classes'"),
        ({"classes": ["a", "b"], "shape": [1.0, 2.0, 2.0]}, "no list of int 'shape'"),
        ({"classes": ["a", "b"], "shape": [1, 2, 2], "fingerprint": "{"}, "images are like"),
        ({"classes": ["a", "b"], "shape": [1, 2, 2], "fingerprint": "{}"}, "images are like"),
    ],
)
def test_what_says_nothing_of_the_images_is_refused(record, named):
    with pytest.raises(UserError, match=named):
        told_data(RecordDict({"data": ConfigRecord(record)}))


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), ARRAYS, max_size=5))
def test_what_is_packed_is_one_array_and_comes_back_as_it_was(arrays):
    record = arrays_record(arrays)
    # As the other end has it.
    there = packed(record)
    sent = Array.inflate(next(iter(there.values())).deflate(), next(iter(there.values())).children)
    there[next(iter(there))] = sent
    assert len(there) == 1
    assert is_packed(there)
    assert not is_packed(record)
    back = unpacked(there)
    assert list(back) == list(record)
    for name, array in record.items():
        assert (back[name].dtype, tuple(back[name].shape)) == (array.dtype, tuple(array.shape))
        assert (back[name].stype, back[name].data) == (array.stype, array.data)
    assert record_bytes(there) == record_bytes(record)


def test_packed_tensors_are_read_like_others():
    record = tensors_to_arrays({"b": torch.arange(3.0), "a": torch.ones(2, 2)})
    read = arrays_to_tensors(packed(record))
    assert list(read) == ["b", "a"]
    assert all(torch.equal(value, read[name]) for name, value in arrays_to_tensors(record).items())


@pytest.mark.parametrize(
    "index",
    [
        b'[["x", "float32", [2], "numpy.ndarray", 5]]',
        b'[["x", "float32", [2], "numpy.ndarray", -4], ["y", "float32", [2], "numpy.ndarray", 8]]',
        b'[["x", "float32", [2.5], "numpy.ndarray", 4]]',
        b'[["x", "float32", [true], "numpy.ndarray", 4]]',
        b'[[3, "float32", [2], "numpy.ndarray", 4]]',
        b'[["x", "float32", [2]]]',
        b'[["x"',
        b"",
        b"5",
        b"null",
        b"[1]",
        b'[["x", "float32", 2, "numpy.ndarray", 4]]',
        b"[" * 100_000,
    ],
)
def test_a_packed_record_that_does_not_fit_is_no_record(index):
    record = packed(arrays_record({"x": np.zeros(2, np.float32)}))
    (name,) = record
    data = len(index).to_bytes(8, "little") + index + b"1234"
    record[name] = Array("uint8", (len(data),), name, data)
    with pytest.raises(ValueError):  # noqa: PT011 - of json's, or ours
        unpacked(record)
    assert record_bytes(record) == 4


def test_a_packed_record_may_be_shorter_than_it_says():
    record = packed(arrays_record({"x": np.zeros(2, np.float32)}))
    (name,) = record
    record[name] = Array("uint8", (9,), name, b"\xff" * 9)
    assert record_bytes(record) == 0
    with pytest.raises(ValueError):  # noqa: PT011 - of json's
        unpacked(record)
