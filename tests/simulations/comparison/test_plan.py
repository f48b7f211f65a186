"""What a comparison is said to take, against what a real one took."""

import math
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from fedkn.config import ExperimentConfig
from fedkn.training.batches import plan_batches
from simulations.comparison import plan as planning
from simulations.comparison.grid import GridConfig, Group, groups, untrainable
from simulations.comparison.plan import Plan, planned, steps_of, told
from simulations.comparison.preflight import check
from simulations.comparison.scheduler import run_grid
from simulations.runs.folder import RunFolder
from simulations.runs.power import power
from tests.simulations.fake_runs import Recorder, make_run

TINY = {
    "rounds": 2,
    "cohort": 3,
    "partition.clients": 3,
    "partition.scheme": "iid",
    "model.width": 4,
    "data.train_limit": 120,
    "compare.normalizers": "none",
    "compare.batch_sizes": "8",
    "compare.seeds": 2,
    "compare.workers": 1,
    "compare.learning_rates": "0.1,0.3",
    "compare.search_rounds": 1,
}


def test_the_plan_counts_the_steps_that_a_run_takes(tmp_path: Path) -> None:
    grid, run = make_run(tmp_path / "run", **{k.replace(".", "__"): v for k, v in TINY.items()})
    plan = planned(grid, check(grid))
    assert (plan.results, plan.searched, plan.more) == (2, 2, 4)
    assert (plan.timed, plan.kinds, plan.workers) == (1, 1, 1)
    assert plan.seconds > 0
    assert plan.bytes > 50e6
    run_grid(grid, run, Recorder())
    cells = RunFolder.open(tmp_path / "run").cells()
    # A search that went beyond its rates made more cells than were sure to be needed.
    known = [
        c for c in cells if c.purpose == "result" or c.config.train.learning_rate in (0.1, 0.3)
    ]
    assert len(known) == 4
    assert plan.steps == sum(round_.steps for cell in known for round_ in cell.rounds)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("cap", [0, 5])
def test_steps_are_those_that_are_planned(accumulate: int, cap: int) -> None:
    for size in (1, 7, 8, 30, 61):
        config = ExperimentConfig.resolve(
            {
                "train.batch_size": 4,
                "train.accumulate": accumulate,
                "train.local_epochs": 2,
                "train.local_steps": cap,
            }
        )
        plan = plan_batches(size, config.train, 1, seed=0, round_=1, client=0)
        assert steps_of(config, size) == len(plan.steps)


def test_axes_and_batch_sizes_are_counted() -> None:
    axes = {"compare.axes.strategy.name": "fedavg,fedprox", "compare.normalizers": "none,batch"}
    grid = GridConfig.resolve(TINY, axes, {"compare.batch_sizes": "1,8"})
    plan = planned(grid, [])
    # BatchNorm does not train on single images: it has one group where the others have two.
    assert (plan.results, plan.searched) == (2 * 3 * 2, 2 * 3 * 2)


def test_a_long_comparison_says_how_to_make_it_smaller() -> None:
    plan = Plan(300, 120, 60, 4_000_000, 7260.0, 2, 4, 8, 450_000_000, 64)
    cells, estimate, smaller = told(plan)
    assert cells == (
        "300 result cells and 120 that try learning rates (up to 60 more): about 4,000,000 local "
        "steps of clients."
    )
    assert "2 h 01 min with 2 at a time" in estimate
    assert "4 of 8 kinds of cells timed here" in estimate
    assert "about 450 MB of memory each" in estimate
    assert "--seeds" in smaller
    assert "up to 64 in a round" in smaller
    short = Plan(3, 0, 0, 100, 90.0, 2, 4, 4, 450_000_000, 64)
    assert len(told(short)) == 2
    assert "that try" not in told(short)[0]
    unknown = Plan(3, 0, 0, 100, math.nan, 2, 0, 4, 450_000_000, 64)
    assert "not known" in told(unknown)[-1]


def test_what_a_client_does_once_a_round_is_not_counted_with_every_step():
    # A pass of 3 s and steps of 0.1 s each: 1 step takes 3.1 s, 4 take 3.4 s.
    step, turn = planning._divided((3.1, 1), (3.4, 4))
    assert (step, turn) == (pytest.approx(0.1), pytest.approx(3.0))
    assert planning._divided((0.2, 1), (0.8, 4)) == (pytest.approx(0.2), pytest.approx(0.0))
    # Noise, or a client whose images are fewer than a batch: no less than what was measured.
    assert planning._divided((0.5, 1), (0.4, 4)) == (pytest.approx(0.1), 0.0)
    assert planning._divided((0.5, 1), (0.4, 1)) == (pytest.approx(0.4), 0.0)


def test_the_pairs_are_those_that_a_report_tests() -> None:
    grid = GridConfig.resolve(
        {
            "compare.normalizers": "kernel,group,none,batch",
            "compare.batch_sizes": "1,4",
            "compare.partitions": "iid,shards",
            "compare.axes": {
                "train.momentum": [0, 0.5, 0.9],
                "strategy.name": ["fedavg", "fedprox"],
            },
        }
    )
    trained = [group for group in groups(grid) if not untrainable(group)]

    def differs_in(one: Group, other: Group) -> list[str]:
        first, second = dict(one.settings), dict(other.settings)
        settings = {key: (first[key], second[key]) for key in grid.compare.axes}
        pairs = {
            **settings,
            "normalizer": (one.normalizer, other.normalizer),
            "batch": (one.batch_size, other.batch_size),
            "partition": (one.partition, other.partition),
        }
        return [key for key, (a, b) in pairs.items() if a != b]

    tested = {"normalizer", "train.momentum", "strategy.name"}
    expected = 0
    for one, other in combinations(trained, 2):
        found = differs_in(one, other)
        expected += len(found) == 1 and found[0] in tested
    assert planning._pairs(trained) == expected > 100


def test_before_it_begins_it_is_said_what_the_seeds_will_find() -> None:
    plan = Plan(90, 0, 0, 1000, 60.0, 2, 1, 1, 10**8, 5, seeds=6, pairs=78)
    sentence = told(plan)[1]
    factor = float(re.search(r"difference of ([\d.]+) times its spread", sentence)[1])
    assert "6 seeds, 78 pairs tested together" in sentence
    assert power(factor, 1.0, 6, 0.05 / 78) == pytest.approx(0.8, abs=0.02)
    few = told(replace(plan, seeds=2))
    assert few[1] == "With fewer than 3 seeds none of 78 pairs can be tested."
    assert told(replace(plan, at_most=True))[0].endswith(
        "at most about 1,000 local steps of clients."
    )
    assert "pair" not in " ".join(told(replace(plan, pairs=0)))
