"""Further axes of a comparison: which may be given, and what cells they make."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.errors import UserError
from fedkn.tables import read_toml
from simulations.comparison.axes import combinations, point_at, slug
from simulations.comparison.grid import (
    GridConfig,
    cells_in,
    experiments,
    groups,
    result_cells,
    search_cells,
)
from simulations.runs.axes import point_of, value_of

SMALL = {"compare.normalizers": "kernel,group", "compare.batch_sizes": "2,8"}


def grid_of(axes: dict[str, Any], **settings_: Any) -> GridConfig:
    flat = {f"compare.axes.{key}": values for key, values in axes.items()}
    return GridConfig.resolve(SMALL, {k.replace("__", "."): v for k, v in settings_.items()}, flat)


def test_every_value_is_a_point_of_every_group() -> None:
    grid = grid_of({"strategy.name": "fedavg,scaffold", "train.momentum": [0, 0.9]})
    made = groups(grid)
    assert len(made) == 2 * 2 * 2 * 2
    assert len({group.id for group in made}) == len(made)
    for group in made:
        cells = (*result_cells(grid, group, 0.1), *search_cells(grid, group, 0.1))
        for cell in cells:
            assert (cell.config.strategy.name, cell.config.train.momentum) == tuple(
                value for _, value in group.settings
            )
            assert point_of(cell.config, grid.compare.axes) == group.point
    own = grid.compare.seeds + len(grid.compare.learning_rates)
    assert cells_in(grid) == len(made) * own


def test_a_grid_without_axes_is_as_it_was() -> None:
    plain = GridConfig.resolve(SMALL)
    assert not [key for key in plain.flat() if key.startswith("compare.axes")]
    assert [group.id for group in groups(plain)][:2] == [
        "kernel-b2-dirichlet0.3",
        "kernel-b8-dirichlet0.3",
    ]
    varied = grid_of({"strategy.name": "fedavg,fedprox"})
    assert {group.id.removesuffix("-strategy.name_fedavg") for group in groups(varied)} >= {
        group.id for group in groups(plain)
    }


def test_cells_of_one_point_are_those_of_a_grid_with_that_setting() -> None:
    varied = grid_of({"train.momentum": "0.9,0.5"})
    plain = GridConfig.resolve(SMALL, {"train.momentum": 0.9})
    alone = {
        (g.normalizer, g.batch_size): result_cells(plain, g, 0.1)[0].config.flat()
        for g in groups(plain)
    }
    for group in groups(varied):
        if group.settings == (("train.momentum", 0.9),):
            flat = result_cells(varied, group, 0.1)[0].config.flat()
            expected = alone[group.normalizer, group.batch_size]
            assert {k for k in flat if flat[k] != expected[k]} == {"checkpoint.cell"}


def test_file_command_line_and_resumed_grid_agree(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(
        "[compare]\nnormalizers = ['kernel', 'group']\nbatch_sizes = [2, 8]\n[compare.axes]\n"
        '"strategy.name" = ["fedavg", "scaffold"]\n"train.local_steps" = [5, 10]\n'
        '"model.options.depth" = [1, 2]\n'
    )
    inline = tmp_path / "inline.toml"
    inline.write_text(
        "[compare]\nnormalizers = ['kernel', 'group']\nbatch_sizes = [2, 8]\n"
        'axes = {"strategy.name" = ["fedavg", "scaffold"], train.local_steps = [5, 10], '
        '"model.options.depth" = [1, 2]}\n'
    )
    strings = grid_of(
        {
            "strategy.name": "fedavg, scaffold,fedavg",
            "train.local_steps": "5,10",
            "model.options.depth": "1,2",
        }
    )
    assert GridConfig.resolve(read_toml(file)) == strings
    assert GridConfig.resolve(read_toml(inline)) == strings
    assert GridConfig.resolve(strings.flat()) == strings
    assert strings.compare.axes["model.options.depth"] == (1, 2)
    # An option of the command line replaces the values that the file has of that axis alone.
    fewer = GridConfig.resolve(read_toml(file), {"compare.axes.strategy.name": "fedprox"})
    assert fewer.compare.axes["strategy.name"] == ("fedprox",)
    assert fewer.compare.axes["train.local_steps"] == (5, 10)


def test_options_keep_their_types() -> None:
    grid = grid_of({"model.options.kind": ["1", "two"], "model.options.size": [1, 2.5, True]})
    assert grid.compare.axes["model.options.kind"] == ("1", "two")
    assert grid.compare.axes["model.options.size"] == (1, 2.5, True)
    again = GridConfig.resolve(grid.flat())
    assert len(experiments(again)) == 2 * 3
    for group in groups(again):
        (config, *_) = (cell.config for cell in result_cells(again, group, 0.1))
        for key, value in group.settings:
            found = value_of(config, key)
            assert (type(found), found) == (type(value), value)


def test_an_axis_of_rounds_reaches_the_searches_too() -> None:
    grid = grid_of({"rounds": "3,6"})
    rounds = {
        (cell.purpose, cell.config.rounds)
        for group in groups(grid)
        for cell in (*search_cells(grid, group, 0.1), *result_cells(grid, group, 0.1))
    }
    assert rounds == {("search", 3), ("search", 6), ("result", 3), ("result", 6)}
    short = grid_of({"rounds": "3,6"}, compare__search_rounds=2)
    searched = [search_cells(short, group, 0.1)[0].config.rounds for group in groups(short)]
    assert set(searched) == {2}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"normalizer.name": "kernel,group"}, "--normalizer"),
        ({"train.batch_size": "1,2"}, "--batch-size"),
        ({"train.learning_rate": "0.1,0.2"}, "--learning-rate"),
        ({"seed": "1,2"}, "--seeds"),
        ({"partition.alpha": "0.1,1"}, "--partition"),
        ({"partition": "iid"}, "--partition"),
        ({"evaluation.split": "test"}, "validation images"),
        ({"checkpoint.cell": "a,b"}, "a run sets it"),
        ({"compare.seeds": "1,2"}, "setting of an experiment"),
        ({"strategy.nmae": "fedavg"}, "strategy.name"),
        ({"train.momentum": "0.5,fast"}, "train.momentum"),
        ({"train.momentum": [0.5, float("nan")]}, "train.momentum"),
        ({"train.momentum": ""}, "no values"),
        ({"train.momentum": []}, "no values"),
        ({"train.momentum": [[0.5]]}, "plain value"),
        ({"train": [1]}, "table of settings"),
        ({"model.options": ["{}"]}, "model.options.NAME"),
        ({"cohort": "5,50"}, "cohort"),
        ({"data.validation_fraction": [0.1, 0]}, "validation_fraction"),
        ({"normalizer.options.nothing": "1,2"}, "option"),
        ({"train.local_steps": list(range(1, 20_000))}, "too large"),
    ],
)
def test_what_cannot_be_an_axis_is_refused_by_name(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        grid_of(axes)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_too_many_axes_are_refused() -> None:
    with pytest.raises(UserError, match="too many"):
        grid_of({f"model.options.a{number}": "1" for number in range(9)})


@pytest.mark.parametrize("axes", ["strategy.name", ["strategy.name"], 3, True])
def test_axes_that_are_no_table_are_refused(axes: object) -> None:
    with pytest.raises(UserError, match=r"compare\.axes"):
        GridConfig.resolve({"compare": {"axes": axes}})


@given(
    st.lists(
        st.one_of(st.text(max_size=120), st.integers(), st.floats(allow_nan=False), st.booleans()),
        min_size=2,
        max_size=6,
    ),
    st.lists(st.text(alphabet="ab-_ /é", max_size=3), min_size=2, max_size=4, unique=True),
)
@settings(deadline=None, max_examples=200)
def test_files_of_different_points_have_different_safe_names(
    first: list[Any], second: list[str]
) -> None:
    points = combinations({"model.options.a": tuple(first), "model.options.b": tuple(second)})
    names = {slug(point) for point in points}
    assert len(names) == len({point_at(point) for point in points})
    assert all(re.fullmatch(r"[A-Za-z0-9_.+-]{1,95}", name) for name in names)
