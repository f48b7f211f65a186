from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from simulations.engines.records import copied


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
