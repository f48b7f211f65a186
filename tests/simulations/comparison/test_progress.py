import json
from pathlib import Path

import pytest
from rich.console import Console

from simulations.comparison.duration import duration
from simulations.comparison.estimate import Estimator
from simulations.comparison.grid import Cell, GridConfig, groups, result_cells
from simulations.comparison.progress import shown_progress
from simulations.comparison.scheduler import Board, expected_cost
from simulations.runs.history import History
from simulations.runs.results import Round


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def two_cells(rounds: int = 10) -> tuple[Cell, Cell]:
    grid = GridConfig.resolve(
        {"rounds": rounds, "compare.normalizers": "kernel", "compare.batch_sizes": "2,8"}
    )
    small, large = (result_cells(grid, group, 0.1)[0] for group in groups(grid))
    return small, large


def write(metrics: Path, cell: Cell, rounds: int, seconds: float) -> None:
    with metrics.open("a") as file:
        start = {"cell": cell.id, "kind": "resume", "round": 0}
        file.write(json.dumps(start) + "\n")
        for round_ in range(1, rounds + 1):
            line: dict[str, object] = dict.fromkeys(Round.__dataclass_fields__, 0)
            line |= {"round": round_, "seconds": seconds}
            nobody: dict[str, object] = {name: [] for name in ("cohort", "refused", "failed")}
            nobody |= {"late": [], "state_lost": [], "data_changed": []}
            nobody |= {"epsilon": {}, "batch_sizes": {}}
            line = {"cell": cell.id, "kind": "round", **line, **nobody}
            file.write(json.dumps(line) + "\n")


def board(metrics: Path, running: list[Cell], waiting: list[Cell], workers: int = 1) -> Board:
    history = History(metrics)
    history.poll()
    return Board(len(running + waiting), 0, tuple(running), tuple(waiting), workers, history)


def test_estimate_scales_measured_rounds_to_what_is_left(tmp_path: Path) -> None:
    small, large = two_cells()
    metrics, clock = tmp_path / "metrics.jsonl", Clock()
    estimator = Estimator(clock)
    assert estimator.seconds_left(board(metrics, [small], [large])) is None
    clock.now += 1000.0  # the start of the workers comes once, and is not scaled
    write(metrics, small, rounds=0, seconds=0.0)
    assert estimator.seconds_left(board(metrics, [small], [large])) is None
    write(metrics, small, rounds=4, seconds=2.0)
    clock.now += 8.0
    expected = 6 * 2.0 + 10 * 2.0 * expected_cost(large.config) / expected_cost(small.config)
    left = estimator.seconds_left(board(metrics, [small], [large]))
    assert left == pytest.approx(expected)
    # Half of the time went into something else than rounds: so it will from now on.
    clock.now += 8.0
    left = estimator.seconds_left(board(metrics, [small], [large]))
    assert left == pytest.approx(2 * expected)


def test_estimate_is_no_less_than_the_longest_cell_and_shares_the_rest(tmp_path: Path) -> None:
    small, large = two_cells()
    metrics, clock = tmp_path / "metrics.jsonl", Clock()
    estimator = Estimator(clock)
    write(metrics, small, rounds=0, seconds=0.0)
    estimator.seconds_left(board(metrics, [small, large], [], workers=2))
    write(metrics, small, rounds=9, seconds=1.0)
    write(metrics, large, rounds=1, seconds=9.0)
    clock.now += 9.0
    left = estimator.seconds_left(board(metrics, [small, large], [], workers=2))
    assert left == pytest.approx(9 * 9.0)


def test_rounds_before_a_resume_cost_no_time_now(tmp_path: Path) -> None:
    small, _ = two_cells()
    metrics, clock = tmp_path / "metrics.jsonl", Clock()
    write(metrics, small, rounds=4, seconds=2.0)
    estimator = Estimator(clock)
    assert estimator.seconds_left(board(metrics, [small], [])) is None
    write(metrics, small, rounds=5, seconds=2.0)
    clock.now += 10.0
    assert estimator.seconds_left(board(metrics, [small], [])) == pytest.approx(5 * 2.0)


def test_expected_cost_falls_with_the_batch_and_rises_with_the_work() -> None:
    small, large = two_cells()
    assert expected_cost(small.config) > expected_cost(large.config)
    twice = expected_cost(small.config.overlay(rounds=20))
    assert twice == pytest.approx(2 * expected_cost(small.config))
    capped = small.config.overlay(train__local_steps=5)
    assert expected_cost(capped) == pytest.approx(expected_cost(small.config) / 10)


@pytest.mark.parametrize("terminal", [True, False])
def test_display_names_what_runs(tmp_path: Path, terminal: bool) -> None:
    small, large = two_cells()
    metrics = tmp_path / "metrics.jsonl"
    write(metrics, small, rounds=4, seconds=2.0)
    console = Console(force_terminal=terminal, width=120, record=True, quiet=False)
    with shown_progress(console, quiet=False) as watcher:
        watcher.update(board(metrics, [small], [large]))
        watcher.notice("cell x failed")
    text = console.export_text()
    assert "0 of 2 cells" in text
    assert "kernel" in text
    assert "4/10" in text
    assert "cell x failed" in text


def test_quiet_display_shows_notices_only(tmp_path: Path) -> None:
    small, large = two_cells()
    console = Console(record=True, width=80)
    with shown_progress(console, quiet=True) as watcher:
        watcher.update(board(tmp_path / "metrics.jsonl", [small], [large]))
        watcher.notice("cell x failed")
    assert console.export_text() == "cell x failed\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
