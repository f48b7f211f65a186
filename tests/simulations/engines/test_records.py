from __future__ import annotations

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkn.data.summary import DataSummary
from fedkn.direct import Asked, Trained
from fedkn.stack import Flat, Layout
from simulations.engines.records import Bytes, copied, pack, unpack

TENSORS = {
    "w": torch.arange(6, dtype=torch.float32).view(2, 3),
    "count": torch.tensor(7),
    "b": torch.tensor([0.5]),
}
LAYOUT = Layout(TENSORS, ["w", "b"])
SUMMARY = DataSummary(("a", "b"), (1, 2, 2))


def there(packed, data: Bytes, device: torch.device | None = None):
    whole = b"".join(data.pieces)
    return unpack(packed, lambda offset, length: whole[offset : offset + length], device)


def flat() -> Flat:
    found = Flat.of(LAYOUT, TENSORS)
    assert found is not None
    return found


def test_what_clients_are_asked_without_messages_goes_to_a_worker_once():
    sent, data = flat(), Bytes()
    asked = [Asked({"round": i, "some": [1]}, SUMMARY, sent, sent if i else None) for i in (0, 1)]
    packed = [pack(one, data) for one in asked]
    assert data.size == sum(len(part) for part in sent.data)
    for before, one in zip(asked, packed, strict=True):
        after = there(one, data, torch.device("cpu"))
        assert isinstance(after, Asked)
        assert (after.told, after.data) == (before.told, SUMMARY)
        for name, value in after.sent.tensors().items():
            assert torch.equal(value, TENSORS[name])
        assert (after.control is None) == (before.control is None)


def test_an_update_comes_back_as_it_was_whether_it_fits_or_not():
    for tensors in (flat(), {"w": torch.zeros(1)}):
        data = Bytes()
        update = there(pack(Trained({"steps": 3, "train-loss": 0.1}, tensors), data), data)
        assert isinstance(update, Trained)
        assert update.metrics == {"steps": 3, "train-loss": 0.1}
        if isinstance(tensors, Flat):
            assert isinstance(update.tensors, Flat)
            assert update.tensors.layout == LAYOUT
            assert all(map(torch.equal, update.tensors.parts, tensors.parts))
        else:
            assert torch.equal(update.tensors["w"], tensors["w"])


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
