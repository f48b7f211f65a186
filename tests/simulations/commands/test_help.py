"""Help tells every option's default and valid names, and they are those that hold."""

from typing import Any

import pytest
from typer.main import get_command

from fedkn import normalizers
from fedkn.config import ExperimentConfig
from fedkn.data import sources
from fedkn.data.partition import SCHEMES
from fedkn.models.catalog import ARCHITECTURES
from fedkn.tasks import TASKS
from server.strategies.registry import names as strategies
from simulations.cli import app
from simulations.commands import choices
from simulations.comparison.grid import GridConfig

DEFAULTS = GridConfig().flat() | ExperimentConfig().flat()


def options_of(command: str) -> dict[str, Any]:
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    return {of.opts[0]: of for of in found.params if of.param_type_name == "option"}


@pytest.mark.parametrize(
    ("told", "known"),
    [
        (choices.NORMALIZERS, normalizers.names()),
        (choices.MODELS, ARCHITECTURES),
        (choices.SOURCES, sources.names()),
        (choices.STRATEGIES, strategies()),
        (choices.TASKS, TASKS),
        (choices.PARTITIONS, SCHEMES),
    ],
)
def test_the_names_are_those_that_there_are(told: str, known: Any) -> None:
    assert set(told.split(", ")) == set(known)


COMPARE = {
    "--normalizer": "compare.normalizers",
    "--batch-size": "compare.batch_sizes",
    "--learning-rate": "compare.learning_rates",
    "--seeds": "compare.seeds",
    "--seed": "seed",
    "--source": "data.source",
    "--clients": "partition.clients",
    "--cohort": "cohort",
    "--rounds": "rounds",
    "--model": "model.name",
}
RUN = COMPARE | {
    "--normalizer": "normalizer.name",
    "--batch-size": "train.batch_size",
    "--learning-rate": "train.learning_rate",
}


@pytest.mark.parametrize(("command", "keys"), [("compare", COMPARE), ("run", RUN)])
def test_the_defaults_are_those_of_the_configuration(command: str, keys: dict[str, str]) -> None:
    options = options_of(command)
    for name in keys.keys() & options.keys():
        default = DEFAULTS[keys[name]]
        values = default if isinstance(default, tuple) else (default,)
        assert options[name].show_default == ",".join(str(value) for value in values), name


@pytest.mark.parametrize("command", ["compare", "run", "demo", "resume", "report"])
def test_every_option_that_takes_a_value_says_its_default_and_what_it_takes(command: str) -> None:
    for name, option in options_of(command).items():
        assert option.help, name
        if not option.is_flag:
            assert isinstance(option.show_default, str), name
            assert "[" not in option.help, name  # it would be taken for markup, and not be shown


def test_help_lists_names_and_own_references() -> None:
    options = options_of("compare")
    for name in ("--normalizer", "--model", "--source"):
        assert choices.OWN in options[name].help
    assert choices.STRATEGIES in options["--axis"].help
    assert choices.PARTITIONS in options["--partition"].help
