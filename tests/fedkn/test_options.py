from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.options import read_options


def options(*layers: dict) -> dict:
    return read_options(ExperimentConfig.resolve(*layers).model.options)


def test_a_table_dotted_keys_and_json_are_equivalent():
    table = {"model": {"options": {"depth": 3, "stem": "wide", "widths": [16, 32]}}}
    dotted = {
        "model.options.depth": "3",
        "model.options.stem": "wide",
        "model.options.widths": "[16, 32]",
    }
    whole = {"model.options": '{"stem": "wide", "widths": [16, 32], "depth": 3}'}
    assert options(table) == options(dotted) == options(whole) == table["model"]["options"]
    one, other = (ExperimentConfig.resolve(layer) for layer in (table, whole))
    assert one == other
    assert hash(one) == hash(other)


def test_a_layer_changes_single_options_or_all():
    first = {"model": {"options": {"depth": 3, "stem": "wide"}}}
    assert options(first, {"model.options.depth": "4"}) == {"depth": 4, "stem": "wide"}
    assert options(first, {"model.options": '{"depth": 4}'}) == {"depth": 4}
    assert options(first, {"model.options": ""}) == {}
    assert options({"model.options.depth": 4}, first) == {"depth": 3, "stem": "wide"}


def test_texts_of_a_table_stay_texts():
    assert options({"model": {"options": {"version": "3"}}}) == {"version": "3"}
    assert options({"model.options.version": '"3"'}) == {"version": "3"}
    config = ExperimentConfig.resolve({"model": {"options": {"version": "3"}}})
    assert ExperimentConfig.resolve(config.flat()) == config
    assert read_options(config.overlay(seed=1).model.options) == {"version": "3"}


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ({"model.options": "depth"}, "no JSON object"),
        ({"model.options": "[3]"}, "must be a table of options"),
        ({"model.options": 3}, "must be a table of options"),
        ({"model": {"options": {"a": {"b": 1}}}}, "cannot be the name of an option"),
        ({"model.options.a": None}, "must be a text"),
        ({"model": {"options": {"a": float("nan")}}}, "finite"),
        ({"model.options.a b": 1}, "cannot be the name"),
        ({"model.optons.a": 1}, "unknown configuration key"),
        ({"model.name.a": 1}, "unknown configuration key"),
    ],
)
def test_what_is_no_table_of_options_is_refused_in_one_line(layer: dict, said: str):
    with pytest.raises(UserError, match=said) as caught:
        options(layer)
    assert "\n" not in str(caught.value)
    assert "model." in str(caught.value)


NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
VALUES = st.one_of(
    st.text(max_size=20),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_options_go_round(values: dict):
    config = ExperimentConfig.resolve({"model": {"options": values}})
    assert read_options(config.model.options) == values
    again = ExperimentConfig.resolve(json.loads(json.dumps(config.flat())))
    assert again == config
