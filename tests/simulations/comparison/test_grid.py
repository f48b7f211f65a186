import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedkn.errors import UserError
from fedkn.tables import read_toml
from simulations.comparison.grid import (
    Cell,
    GridConfig,
    groups,
    partitions,
    result_cells,
    search_cells,
    searches,
    seeds,
    untrainable,
)


def grid_of(**settings: Any) -> GridConfig:
    return GridConfig.resolve({key.replace("__", "."): v for key, v in settings.items()})


def test_every_combination_of_the_axes_is_one_group() -> None:
    grid = grid_of(
        compare__normalizers="kernel,group,none",
        compare__batch_sizes="1,2",
        compare__partitions="iid,dirichlet:alpha=0.1:minimum=4,shards:clients=9",
    )
    made = groups(grid)
    assert len(made) == 3 * 2 * 3
    assert len({group.id for group in made}) == len(made)
    counts = Counter((g.normalizer, g.batch_size) for g in made)
    assert set(counts.values()) == {3}
    schemes = [(p.scheme, p.alpha, p.minimum, p.clients) for p in partitions(grid)]
    assert schemes == [
        ("iid", 0.3, 8, 20),
        ("dirichlet", 0.1, 4, 20),
        ("shards", 0.3, 8, 9),
    ]


def test_cells_vary_the_experiment_by_their_axes_only() -> None:
    grid = grid_of(train__momentum=0.9, seed=7, rounds=4, compare__search_rounds=2)
    group = groups(grid)[-1]
    for cell in (*search_cells(grid, group, 0.02), *result_cells(grid, group, 0.02)):
        flat, base = cell.config.flat(), grid.experiment.flat()
        changed = {key for key in flat if flat[key] != base[key]}
        assert changed <= {
            "seed",
            "rounds",
            "normalizer.name",
            "train.batch_size",
            "train.learning_rate",
            "evaluation.split",
            "checkpoint.cell",
        }
        assert flat["checkpoint.cell"] == cell.id
        assert flat["train.learning_rate"] == 0.02
        assert flat["rounds"] == (2 if cell.purpose == "search" else 4)


def test_search_never_sees_test_images_nor_the_seeds_of_the_results() -> None:
    grid = grid_of(seed=3, compare__seeds=1000, compare__search_seeds=100)
    assert not set(seeds(grid, "search")) & set(seeds(grid, "result"))
    group = groups(grid)[0]
    searched = search_cells(grid, group, 0.1)
    assert {cell.config.evaluation.split for cell in searched} == {"validation"}
    with pytest.raises(ValueError, match="validation"):
        Cell("x", "search", group, result_cells(grid, group, 0.1)[0].config)


def test_ids_are_readable_and_safe_as_file_names() -> None:
    grid = grid_of(compare__normalizers="kernel", compare__batch_sizes=2)
    (group,) = groups(grid)
    assert result_cells(grid, group, 0.1)[0].id == "kernel-b2-dirichlet0.3-s0"
    names = [cell.id for cell in search_cells(grid, group, 1e-5)]
    assert names == ["search-kernel-b2-dirichlet0.3-lr1e-05-s1000"]
    assert all(re.fullmatch(r"[\w.+-]+", name) for name in names)


def test_group_count_reaches_only_normalizers_that_have_groups() -> None:
    grid = grid_of(normalizer__groups=4, compare__normalizers="kernel,group")
    by_name = {g.normalizer: result_cells(grid, g, 0.1)[0].config for g in groups(grid)}
    assert by_name["group"].normalizer.groups == 4
    assert by_name["kernel"].normalizer.groups == 0


def test_batch_normalization_cannot_train_on_single_images() -> None:
    grid = grid_of(compare__normalizers="batch,kernel", compare__batch_sizes="1,2")
    reasons = {(g.normalizer, g.batch_size): untrainable(g) for g in groups(grid)}
    assert "at least 2" in reasons.pop(("batch", 1))
    assert set(reasons.values()) == {""}


def test_toml_and_command_line_strings_give_the_same_grid(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(
        "rounds = 4\n[partition]\nclients = 9\n[compare]\nnormalizers = ['kernel', 'group']\n"
        "batch_sizes = [1, 2]\nlearning_rates = [0.1, 1]\npartitions = ['iid']\nseeds = 2\n"
    )
    strings = grid_of(
        rounds="4",
        partition__clients="9",
        compare__normalizers="kernel, group,kernel",
        compare__batch_sizes="1,2",
        compare__learning_rates="0.1,1",
        compare__partitions="iid",
        compare__seeds="2",
    )
    assert GridConfig.resolve(read_toml(file)) == strings
    assert GridConfig.resolve(strings.flat()) == strings


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("compare.batch_sizes", "0", "compare.batch_sizes"),
        ("compare.batch_sizes", "two", "compare.batch_sizes"),
        ("compare.batch_sizes", "", "compare.batch_sizes"),
        ("compare.learning_rates", "nan", "compare.learning_rates"),
        ("compare.learning_rates", "0.1,-1", "compare.learning_rates"),
        ("compare.learning_rates", "inf", "finite"),
        ("compare.seeds", "0", "compare.seeds"),
        ("compare.normalizer", "kernel", "compare.normalizers"),
        ("compare.name", "a/b", "compare.name"),
        ("compare.partitions", "dirichlet:0.3", "name=value"),
        ("compare.partitions", "dirichlet:alhpa=0.3", "alpha"),
        ("compare.partitions", "dirichlet:alpha=nan", "alpha"),
        ("compare.partitions", "iid:clients=2", "cohort"),
        ("data.validation_fraction", "0", "validation_fraction"),
    ],
)
def test_bad_settings_are_refused_by_name(key: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        GridConfig.resolve({key: value})
    assert "\n" not in str(error.value)


def test_a_single_experiment_searches_nothing_and_may_train_on_every_image() -> None:
    grid = GridConfig.single({"data.validation_fraction": 0, "train.learning_rate": 0.2})
    assert grid.compare.learning_rates == (0.2,)
    assert not searches(grid)
    (group,) = groups(grid)
    (cell,) = result_cells(grid, group, 0.2)
    assert cell.config.train.learning_rate == 0.2
    assert cell.config.data.validation_fraction == 0
    # What a comparison with several rates is told to do is accepted, too.
    GridConfig.resolve({"data.validation_fraction": 0, "compare.learning_rates": "0.1"})
