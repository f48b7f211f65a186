from __future__ import annotations

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from clients.local_state import Kept, Room
from fedkn.data.summary import DataSummary
from fedkn.direct import Asked, Trained
from fedkn.stack import Flat, Layout
from simulations.engines.records import (
    Bytes,
    Received,
    copied,
    pack,
    pack_answers,
    pack_kept,
    unpack,
    unpack_answers,
    unpack_kept,
)

TENSORS = {
    "w": torch.arange(6, dtype=torch.float32).view(2, 3),
    "count": torch.tensor(7),
    "b": torch.tensor([0.5]),
}
LAYOUT = Layout(TENSORS, ["w", "b"])
SUMMARY = DataSummary(("a", "b"), (1, 2, 2))


CPU = torch.device("cpu")


def received(data: Bytes) -> Received:
    return Received(bytearray(b"".join(data.pieces)), 0)


def flat() -> Flat:
    found = Flat.of(LAYOUT, TENSORS)
    assert found is not None
    return found


def test_what_clients_are_asked_without_messages_goes_to_a_worker_once():
    sent, data = flat(), Bytes()
    asked = [Asked({"round": i, "some": [1]}, SUMMARY, sent, sent if i else None) for i in (0, 1)]
    packed = [pack(one, data) for one in asked]
    # Float32 and int64, each from a multiple of 64 on.
    assert data.size == 64 + 8
    there = received(data)
    found = [unpack(one, there, CPU) for one in packed]
    assert isinstance(found[0], Asked)
    assert isinstance(found[1], Asked)
    assert found[0].sent is found[1].sent is found[1].control
    for before, after in zip(asked, found, strict=True):
        assert isinstance(after, Asked)
        assert (after.told, after.data) == (before.told, SUMMARY)
        for name, value in after.sent.tensors().items():
            assert torch.equal(value, TENSORS[name])
        assert (after.control is None) == (before.control is None)


def test_what_a_group_answers_comes_back_as_it_was_the_updates_as_one_stack():
    other = Flat.of(LAYOUT, {name: value + 1 for name, value in TENSORS.items()})
    assert other is not None
    unfit: dict[str, torch.Tensor] = {"w": torch.zeros(1)}
    answers = [
        Trained({"steps": 3, "train-loss": 0.1}, flat()),
        None,
        Trained({"steps": 4}, unfit),
        Trained({"steps": 5}, other),
    ]
    data = Bytes()
    packed = pack_answers(answers, LAYOUT, data)
    found = unpack_answers(packed, LAYOUT, received(data), CPU)
    assert [one and one.metrics for one in found] == [one and one.metrics for one in answers]
    first, nothing, odd, last = found
    assert nothing is None
    assert odd.tensors.keys() == {"w"}
    assert torch.equal(odd.tensors["w"], unfit["w"])
    for after, before in ((first.tensors, flat()), (last.tensors, other)):
        assert after.layout == LAYOUT
        assert all(map(torch.equal, after.parts, before.parts))
    for one, two in zip(first.tensors.parts, last.tensors.parts, strict=True):
        assert one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()


def test_tensors_of_any_dtype_and_none_travel():
    values = {
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
        "flag": torch.tensor([True, False, True]),
    }
    layout = Layout(values)
    before = Flat.of(layout, values)
    data = Bytes()
    packed = pack_answers([Trained({}, before)], layout, data)
    (after,) = unpack_answers(packed, layout, received(data), CPU)
    assert {n: (t.dtype, t.tolist()) for n, t in after.tensors.tensors().items()} == {
        n: (t.dtype, t.tolist()) for n, t in values.items()
    }


def test_of_what_a_client_keeps_only_the_new_comes_back():
    room = Room()
    here = Kept(room)
    for round_ in (1, 2):
        here.put("run", round_, {"c": torch.full((100,), float(round_))}, only=True)
    data = Bytes()
    there = unpack_kept(pack_kept(here, data), received(data), Kept(Room()))
    assert there.versions.keys() == here.versions.keys()
    known = dict(there.versions)
    there.drop("run", 1)
    there.put("run", 3, {"c": torch.full((100,), 3.0)}, only=True)
    there["record"] = ConfigRecord({"a": 1})
    back = Bytes()
    packed = pack_kept(there, back, known)
    # 100 numbers of the new version, none of the one that is known.
    assert back.size == 400
    two = here.versions["run", 2]
    assert unpack_kept(packed, received(back), here) is here
    assert here.versions.keys() == {("run", 2), ("run", 3)}
    assert here.versions["run", 2] is two
    assert here.versions["run", 3].tensors()["c"].tolist() == [3.0] * 100
    assert here["record"] == ConfigRecord({"a": 1})


def test_who_keeps_nothing_has_nothing_packed():
    data = Bytes()
    assert pack_kept(Kept(Room()), data) is None
    assert not unpack_kept(None, received(data), Kept(Room()))


def test_what_a_client_is_told_is_its_own():
    asked = Asked({"some": [1]}, SUMMARY, flat())
    own = copied(asked)
    own.told["some"].append(2)
    own.told["more"] = 3
    own.sent.tensors()["w"].zero_()
    assert asked.told == {"some": [1]}
    assert torch.equal(asked.sent.tensors()["w"], TENSORS["w"])


def test_what_is_done_to_a_copy_does_not_reach_the_original():
    def content() -> RecordDict:
        arrays = ArrayRecord()
        arrays["w"] = Array("float32", (1,), "numpy.ndarray", b"abcd")
        return RecordDict(
            {
                "arrays": arrays,
                "metrics": MetricRecord({"a": [1, 2]}),
                "config": ConfigRecord({"b": 1}),
            }
        )

    original = content()
    copy = copied(original)
    assert copy == original
    copy.array_records["arrays"]["w"].data = b"wxyz"
    copy.array_records["arrays"]["v"] = Array("float32", (0,), "numpy.ndarray", b"")
    copy.metric_records["metrics"]["a"].append(3)
    copy.config_records["config"]["b"] = 2
    copy["more"] = ConfigRecord()
    assert original == content()
