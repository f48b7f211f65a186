from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fedkn import models, normalizers
from fedkn.config import ExperimentConfig
from fedkn.data import partition, sources
from fedkn.errors import UserError
from fedkn.sections import check_keys, validated
from fedkn.tables import nest, read_toml
from server.strategies import registry as strategies

REPOSITORY = Path(__file__).parents[2]

# A value for every kind of setting that differs from the default.
TOML = """
seed = 7
cohort = 3

[partition]
clients = 6
alpha = 1

[model]
dropout_p = 0.125

[strategy]
name = "fedadam"
server_learning_rate = 0.5

[data]
flip = true
"""
DOTTED = {
    "seed": 7,
    "cohort": 3,
    "partition.clients": 6,
    "partition.alpha": 1.0,
    "model.dropout_p": 0.125,
    "strategy.name": "fedadam",
    "strategy.server_learning_rate": 0.5,
    "data.flip": True,
}


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# -- three ways in, one configuration -------------------------------------------------------------


def test_toml_command_line_and_run_config_are_equivalent(tmp_path):
    path = tmp_path / "experiment.toml"
    path.write_text(TOML)
    from_toml = ExperimentConfig.resolve(read_toml(path))
    from_run_config = ExperimentConfig.resolve(DOTTED)
    from_command_line = ExperimentConfig.resolve({k: str(v) for k, v in DOTTED.items()})
    assert from_toml == from_run_config == from_command_line
    assert hash(from_toml) == hash(from_run_config) == hash(from_command_line)
    assert from_toml.flat() == {**ExperimentConfig().flat(), **DOTTED}


def test_flat_goes_round():
    config = ExperimentConfig.resolve(DOTTED)
    assert ExperimentConfig.resolve(config.flat()) == config
    assert nest(config.flat()) == config.model_dump()
    assert all(isinstance(v, (str, int, float, bool)) for v in config.flat().values())


def test_later_layers_win_whatever_their_form():
    config = ExperimentConfig.resolve(
        {"train": {"batch_size": 8, "momentum": 0.5}}, {"train.batch_size": "4"}, {"train": {}}
    )
    assert (config.train.batch_size, config.train.momentum) == (4, 0.5)


def test_overlay():
    config = ExperimentConfig().overlay(train__batch_size=16, seed=3)
    assert (config.train.batch_size, config.seed) == (16, 3)
    assert config.overlay() == config
    with pytest.raises(UserError, match=r"did you mean 'train\.batch_size'"):
        config.overlay(train__batchsize=2)


def test_configurations_are_immutable_and_hashable():
    config = ExperimentConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.train.batch_size = 1  # type: ignore[misc]
    assert len({config, ExperimentConfig(), config.overlay(seed=1)}) == 2


# -- what Flower must know ------------------------------------------------------------------------


def _typed(flat: dict[str, Any]) -> dict[str, tuple[type, Any]]:
    return {key: (type(value), value) for key, value in flat.items()}


def _pasted(flat: dict[str, Any]) -> str:
    tables: dict[str, list[str]] = {}
    for key, value in flat.items():
        table, _, name = key.rpartition(".")
        text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
        tables.setdefault(table, []).append(f"{name} = {text}")
    headed = (
        f"[tool.flwr.app.config{'.' + table if table else ''}]\n" + "\n".join(lines)
        for table, lines in tables.items()
    )
    return "\n\n".join(headed)


def test_pyproject_declares_every_key_with_its_default():
    """Flower refuses run-config keys that pyproject.toml does not declare."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    flat: dict[str, Any] = {}
    for key, value in declared.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": item for name, item in value.items()})
        else:
            flat[key] = value
    # Under flwr run the data are divided among as many clients as there are SuperNodes.
    defaults = {**ExperimentConfig().flat(), "partition.clients": 0}
    assert _typed(flat) == _typed(defaults), f"paste into pyproject.toml:\n\n{_pasted(defaults)}\n"


def test_a_federation_of_unknown_size_takes_the_number_of_nodes():
    unknown = ExperimentConfig.resolve({"partition.clients": 0, "cohort": 5})
    assert unknown.for_nodes(2).partition.clients == 2
    assert unknown.for_nodes(2).cohort == 2
    assert unknown.for_nodes(20).cohort == 5
    assert ExperimentConfig().for_nodes(2) == ExperimentConfig()


def test_what_would_be_pasted_is_right():
    declared = tomllib.loads(_pasted(ExperimentConfig().flat()))["tool"]["flwr"]["app"]["config"]
    assert declared == ExperimentConfig().model_dump()


# -- bad input ------------------------------------------------------------------------------------

BAD = [
    ("train.batch_size", 0),
    ("train.batch_size", -1),
    ("train.batch_size", 2.5),
    ("train.batch_size", "two"),
    ("train.local_epochs", 0),
    ("train.local_steps", -1),
    ("train.momentum", 1.0),
    ("train.momentum", -0.1),
    ("train.decay", 0),
    ("train.decay", 1.5),
    ("train.schedule", "cosin"),
    ("rounds", 0),
    ("rounds", True),
    ("train.learning_rate", False),
    ("cohort", 0),
    ("seed", -1),
    ("partition.clients", -1),
    ("partition.shards_per_client", 0),
    ("partition.minimum", 0),
    ("data.validation_fraction", 1.0),
    ("data.image_size", -8),
    ("data.crop_padding", -1),
    ("data.download", "perhaps"),
    ("data.source", 3),
    ("data.scaling", "standardised"),
    ("model.width", -4),
    ("model.dropout_p", 1.0),
    ("model.dropout_p", "high"),
    ("model.final_norm", "all"),
    ("normalizer.groups", -2),
    ("strategy.trim", 0.5),
    ("strategy.malicious_clients", -1),
    ("strategy.tau", 0),
    ("evaluation.split", "train"),
    ("evaluation.every", 0),
    ("evaluation.target", "high"),
    ("evaluation.target", True),
    ("task.options", "[1]"),
    ("server.max_failed_rounds", 0),
    ("checkpoint.keep", 0),
    ("checkpoint.every", 0),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_a_bad_value_is_one_line_naming_key_and_value(key, value):
    with pytest.raises(UserError) as error:
        ExperimentConfig.resolve({key: value})
    text = one_line(error)
    assert text.startswith(f"{key} = {value!r}: ")


FLOATS = [key for key, value in ExperimentConfig().flat().items() if isinstance(value, float)] + [
    "model.dropout_p",
    "strategy.server_learning_rate",
    "strategy.tau",
]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "inf", "-inf", -1, ""])
def test_no_number_may_be_endless_undefined_or_negative(key, value):
    with pytest.raises(UserError) as error:
        ExperimentConfig.resolve({key: value})
    assert one_line(error).startswith(f"{key} = ")


@pytest.mark.parametrize("value", [0, -0.05, math.nan, math.inf, "fast"])
def test_a_bad_learning_rate(value):
    with pytest.raises(UserError, match=r"^train\.learning_rate = "):
        ExperimentConfig.resolve({"train.learning_rate": value})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.batchsize", "train.batch_size"),
        ("batch_size", "train.batch_size"),
        ("normaliser.name", "normalizer.name"),
        ("round", "rounds"),
        ("train.lerning_rate", "train.learning_rate"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(UserError) as error:
        ExperimentConfig.resolve({key: 1})
    assert f"unknown configuration key '{key}': did you mean '{nearest}'?" in one_line(error)


def test_a_table_is_not_a_setting():
    with pytest.raises(UserError, match=r"'train' is a table of settings.*train\.… = value"):
        ExperimentConfig.resolve({"train": 3})
    with pytest.raises(UserError, match=r"unknown configuration key 'seed\.x'"):
        ExperimentConfig.resolve({"seed": {"x": 1}})


def test_a_cohort_larger_than_the_federation():
    with pytest.raises(UserError, match=r"cohort \(30\).*partition\.clients \(20\)"):
        ExperimentConfig.resolve({"cohort": 30})


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"seed = \n", "not valid TOML.*line 1"), (b"a\n[b", "line"), (b"\xff\xfe", "cannot read")],
)
def test_a_broken_toml_file_is_named(content, message, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_toml(path)
    assert str(path) in one_line(error)


def test_a_missing_toml_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml.*No such file"):
        read_toml(tmp_path / "none.toml")


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=12), st.one_of(st.text(), st.floats(), st.booleans())))
def test_whatever_comes_in_is_a_configuration_or_a_user_error(values):
    try:
        config = ExperimentConfig.resolve(values)
    except UserError:
        return
    assert isinstance(config, ExperimentConfig)


@settings(deadline=None)
@given(st.sampled_from(sorted(ExperimentConfig().flat())), st.one_of(st.text(), st.floats()))
def test_whatever_a_key_is_given_is_accepted_or_a_user_error(key, value):
    try:
        config = ExperimentConfig.resolve({key: value})
    except UserError:
        return
    assert ExperimentConfig.resolve(config.flat()) == config


def test_checking_keys_stops_at_the_first_unknown():
    check_keys(ExperimentConfig, ["seed", "train.momentum"])
    with pytest.raises(UserError, match="'one'"):
        check_keys(ExperimentConfig, ["seed", "one", "two"])


def test_validated_takes_nested_tables():
    assert validated(ExperimentConfig, {"train": {"batch_size": "3"}}).train.batch_size == 3
    with pytest.raises(UserError, match=r"^train\.batch_size = 0"):
        validated(ExperimentConfig, {"train": {"batch_size": 0}})


# -- help that does not go stale ------------------------------------------------------------------


def _described(section: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= _described(kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field.description
    return found


def test_every_setting_is_described():
    described = _described(ExperimentConfig)
    assert described.keys() == ExperimentConfig().flat().keys()
    assert all(described.values())


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("data.source", sources.names()),
        ("partition.scheme", partition.SCHEMES),
        ("model.name", models.names()),
        ("normalizer.name", normalizers.names()),
        ("strategy.name", strategies.names()),
    ],
)
def test_a_setting_that_takes_a_name_lists_valid_ones(key, names):
    description = _described(ExperimentConfig)[key]
    assert description is not None
    ours = description.split("or your own")[0].strip(" ,").split(": ")[-1]
    listed = [name.strip() for name in ours.replace(" or ", ",").split(",")]
    assert listed
    assert set(listed) - {"…"} <= set(names)
    assert "…" in listed or set(listed) == set(names)
    assert ExperimentConfig().flat()[key] in names
