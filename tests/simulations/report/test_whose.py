"""Whose examples a client has, in the report's picture of a partition."""

from simulations.report.pictures import partition_picture
from simulations.runs.records import EXAMPLES, PartitionRecord


def test_clients_are_named_where_the_data_name_them() -> None:
    record = PartitionRecord(
        "natural, 2 clients", 0, ["cat", "dog"], [[1, 2], [3, 4]], names=["<i>", "bob\x1b"]
    )
    picture = partition_picture(record)
    assert "0 &lt;i&gt;" in picture
    assert "1 bob\\x1b" in picture
    assert "<i>" not in picture


def test_examples_without_classes_are_drawn_by_client_alone() -> None:
    picture = partition_picture(PartitionRecord("iid, 2 clients", 0, [EXAMPLES], [[5], [7]]))
    assert ">examples<" in picture
