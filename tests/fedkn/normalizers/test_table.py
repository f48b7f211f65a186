"""The tables of docs/normalizers.md; tests/test_docs.py holds the page equal to them."""

import re

import pytest

from fedkn import normalizers
from fedkn.normalizers import table


@pytest.fixture(scope="module")
def tables():
    """The two tables: a dictionary by column for each name."""
    parsed = []
    for text in table.markdown().split("\n\n"):
        head, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines()]
        cells = [re.split(r" ?\| ?", line.strip())[1:-1] for line in text.splitlines()[2:]]
        assert {len(row) for row in cells} == {len(head)}
        assert len(rows) == len(normalizers.names())
        parsed.append({row[0].strip("`"): dict(zip(head, row, strict=True)) for row in cells})
    return parsed


def test_a_row_for_each_in_the_registrys_order(tables):
    assert [tuple(rows) for rows in tables] == [normalizers.names()] * 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kernel", "all shared"),
        ("brn", "all shared"),
        ("feature_norm", "all shared"),
        (
            "fedbn",
            "all shared but `norm.weight`, `norm.bias`, `norm.running_mean`, `norm.running_var` "
            "(local), `norm.num_batches_tracked` (counter)",
        ),
        (
            "hbn",
            "all shared but `norm.mixing` (local), `norm.running_mean` (mean), "
            "`norm.running_var` (variance)",
        ),
        (
            "fixbn",
            "at first all shared but `norm.num_batches_tracked` (counter); later all shared but "
            "`norm.running_mean`, `norm.running_var` (frozen), "
            "`norm.num_batches_tracked` (counter)",
        ),
    ],
)
def test_what_becomes_of_its_tensors(tables, name, said):
    assert tables[0][name]["in a round"] == said


def test_every_rule_that_batch_can_have_is_there(tables):
    parts = tables[0]["batch"]["in a round"].split("; ")
    rules = dict(part.split(": ") for part in parts)
    choices = ("averaged", "recalibrated", "local")
    assert list(rules) == [f"`bn_statistics = {choice}`" for choice in choices]
    assert "(mean)" in rules["`bn_statistics = recalibrated`"]
    assert "running_var` (local)" in rules["`bn_statistics = local`"]


def test_needs_options_and_when_it_does_not_help(tables):
    first, second = tables
    assert first["batch"]["smallest batch"] == "2"
    assert first["fedbn"]["what it is"] == "FedBN: batch normalization that never leaves the client"
    assert "[early-training.md](early-training.md)" in first["fbn"]["not for"]
    assert second["frn"]["options"] == "`learn_eps = true`"
    assert second["batch"]["examples of a batch"] == "mixed"
    assert [n for n, row in second.items() if row["pixels"] == "unit"] == ["kernel", "ws_kernel"]
    assert second["rms"]["scale and bias"] == "yes"
    assert second["none"]["scale and bias"] == ""
