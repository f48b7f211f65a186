from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from fedkn.errors import UserError
from fedkn.references import load_reference
from simulations.api.settings import COMPARE, RUN, keys_of, reference_to, table_of
from simulations.comparison.grid import GridConfig
from tests.simulations.api.parts import Outer, make


@pytest.mark.parametrize("short", [RUN, COMPARE])
def test_every_short_name_is_a_setting(short: dict[str, str]) -> None:
    known = GridConfig().flat() | {"compare.name": "", "compare.partitions": ""}
    compare = {f"compare.{name}" for name in GridConfig().compare.model_fields_set}
    fields = {f"compare.{name}" for name in type(GridConfig().compare).model_fields}
    assert set(short.values()) <= known.keys() | compare | fields


def test_the_flags_of_the_command_line_are_the_short_names() -> None:
    import inspect

    from simulations.commands.compare import compare
    from simulations.commands.run import run

    config = {"rounds", "cohort", "seed"}  # have no other name as keys
    ways = {"file", "settings", "out", "as_json", "debug"}
    for command, short in ((run, RUN), (compare, COMPARE)):
        flags = set(inspect.signature(command).parameters)
        assert flags - ways <= short.keys() | config
        # On the command line: --set strategy.name=…
        assert short.keys() - flags == {"strategy", "observers", "task"}


def test_names_tables_and_keys_give_the_same_settings() -> None:
    ways = [
        {"model": "resnet18", "normalizer": "group", "train": {"momentum": 0.9}},
        {"model": {"name": "resnet18"}, "normalizer": {"name": "group"}, "train.momentum": 0.9},
        {"model.name": "resnet18", "normalizer.name": "group", "train": {"momentum": 0.9}},
    ]
    grids = [GridConfig.single(keys_of(way, RUN)) for way in ways]
    assert grids[0] == grids[1] == grids[2]
    assert grids[0].model.name == "resnet18"
    assert grids[0].train.momentum == 0.9


def test_lists_are_axes() -> None:
    keys = keys_of({"normalizer": ["kernel", "group"], "batch_size": (1, 2), "seeds": 3}, COMPARE)
    grid = GridConfig.resolve(keys)
    assert grid.compare.normalizers == ("kernel", "group")
    assert grid.compare.batch_sizes == (1, 2)
    assert grid.compare.seeds == 3


def test_an_axis_is_a_table_of_values() -> None:
    values = {"strategy.name": ["fedavg", "scaffold"], "train": {"momentum": [0, 0.9]}}
    grid = GridConfig.resolve(keys_of({"axis": values}, COMPARE))
    assert grid.compare.axes == {
        "strategy.name": ("fedavg", "scaffold"),
        "train.momentum": (0.0, 0.9),
    }


def test_what_is_none_is_not_given() -> None:
    assert keys_of({"model": None, "rounds": 3}, RUN) == {"rounds": 3}


def test_paths_are_texts(tmp_path: Path) -> None:
    assert keys_of({"root": tmp_path}, RUN) == {"data.root": str(tmp_path)}


@pytest.mark.parametrize("part", [make, Outer, Outer.Inner])
def test_own_objects_become_references_that_lead_back(part: object) -> None:
    reference = reference_to(part)
    assert load_reference("model", reference) is part
    assert keys_of({"model": part}, RUN) == {"model.name": reference}
    assert keys_of({"normalizer": ["kernel", part]}, COMPARE) == {
        "compare.normalizers": ["kernel", reference]
    }
    assert keys_of({"model": {"name": part}}, RUN) == {"model": {"name": reference}}


def local() -> object:
    def inside() -> None:
        pass

    return inside


def in_main() -> object:
    def script() -> None:
        pass

    script.__module__, script.__qualname__ = "__main__", "script"
    return script


def elsewhere() -> object:
    def impostor() -> None:
        pass

    impostor.__module__, impostor.__qualname__ = make.__module__, "make"
    return impostor


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (local(), "inside a function"),
        (lambda: None, "inside a function"),
        (in_main(), "script or notebook"),
        (elsewhere(), "under that name"),
        (partial(make), "no function or class"),
    ],
)
def test_an_object_that_no_other_process_finds_is_refused_in_one_line(
    part: object, said: str
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        keys_of({"model": part}, RUN)
    assert ".py file" in str(refused.value)
    assert "model" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ["evaluation.split", "checkpoint.folder", "checkpoint.cell"])
def test_what_a_run_sets_itself_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=key):
        keys_of({key: "x"}, RUN)


def test_settings_come_from_a_file_or_a_table(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("rounds = 3\n[model]\nname = 'resnet18'\n")
    assert table_of(file) == table_of({"rounds": 3, "model": {"name": "resnet18"}})
    assert table_of({"model": {"name": make}})["model"] == {"name": reference_to(make)}
    assert table_of(None) == {}
    with pytest.raises(UserError, match=r"nothing\.toml"):
        table_of(tmp_path / "nothing.toml")
