import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from simulations.comparison.grid import GridConfig, Group, groups, search_cells
from simulations.comparison.search import Search, search
from simulations.runs.history import History

Score = Callable[[float, int], list[tuple[float | None, float | None]] | None]


def setting(rates: list[float], seeds: int = 1) -> tuple[GridConfig, Group]:
    grid = GridConfig.resolve(
        {
            "rounds": 5,
            "compare.normalizers": "kernel",
            "compare.batch_sizes": 2,
            "compare.learning_rates": rates,
            "compare.search_seeds": seeds,
        }
    )
    return grid, groups(grid)[0]


LOWER = {
    "name": "made up",
    "metric": "rmse",
    "higher_is_better": False,
    "lowest": None,
    "highest": None,
    "unit": "",
}


def finished(
    tmp_path: Path, rates: list[float], score: Score, seeds: int = 1, *, mirrored: bool = False
) -> tuple[Search, list[float]]:
    """Answer the search's cells until it is over; return it and the rates in the order asked.

    `mirrored`: by a metric where lower is better, whose values are those of `score`, negated.
    """
    grid, group = setting(rates, seeds)
    metrics = tmp_path / "metrics.jsonl"
    asked: list[float] = []
    while True:
        # A fresh reader each time: the state follows from the file alone.
        history = History(metrics)
        history.poll()
        state = search(grid, group, history)
        if not state.pending:
            return state, asked
        cell = state.pending[0]
        asked.append(cell.config.train.learning_rate)
        evaluations = score(cell.config.train.learning_rate, cell.config.seed)
        lines: list[dict[str, object]] = [{"kind": "start", "purpose": "search", "config": {}}]
        if mirrored:
            lines[0]["task"] = LOWER
        if evaluations is None:
            lines = []  # it failed before its server said what it is judged by
        # The initial model is evaluated too, and counts for no rate.
        for number, (accuracy, loss) in enumerate(
            [(1.0 - cell.config.train.learning_rate / 1e4, 0.0), *(evaluations or [])]
        ):
            line = {"kind": "evaluation", "round": number, "split": "validation", "examples": 1}
            if lines:
                values = {"rmse": None if accuracy is None else -accuracy}
                told = {"metrics": values} if mirrored else {"accuracy": accuracy}
                lines.append({**line, **told, "loss": loss})
        status = "failed" if evaluations is None else "completed"
        lines.append({"kind": "end", "status": status})
        with metrics.open("a") as file:
            file.writelines(json.dumps({"cell": cell.id, **line}) + "\n" for line in lines)


def peak(best: float) -> Score:
    def score(rate: float, seed: int) -> list[tuple[float | None, float | None]]:
        return [(0.1, 2.3), (1 / (1 + abs(math.log(rate / best))), 1.0)]

    return score


def test_the_best_rate_within_the_grid_is_taken(tmp_path: Path) -> None:
    state, asked = finished(tmp_path, [0.3, 0.01, 0.1, 0.03], peak(0.1))
    assert state.chosen == 0.1
    assert not state.at_edge
    assert sorted(asked) == [0.01, 0.03, 0.1, 0.3]
    assert [trial.learning_rate for trial in state.trials] == [0.01, 0.03, 0.1, 0.3]


@pytest.mark.parametrize(
    ("best", "added", "chosen", "at_edge"),
    [
        (0.9, [1.0, 3.0], 1.0, False),
        (1000.0, [1.0, 3.0], 3.0, True),
        (0.003, [0.003, 0.001], 0.003, False),
        (1e-9, [0.003, 0.001], 0.001, True),
    ],
)
def test_the_grid_is_extended_while_its_end_is_best(
    tmp_path: Path, best: float, added: list[float], chosen: float, at_edge: bool
) -> None:
    state, asked = finished(tmp_path, [0.01, 0.03, 0.1, 0.3], peak(best))
    assert asked[4:] == pytest.approx(added)
    assert (state.chosen, state.at_edge) == (chosen, at_edge)


def test_two_rates_are_extended_by_their_own_step(tmp_path: Path) -> None:
    _, asked = finished(tmp_path, [0.1, 0.2], peak(100.0))
    assert asked == [0.1, 0.2, 0.4, 0.8]


def test_a_single_rate_is_not_searched() -> None:
    grid, group = setting([0.07])
    assert search(grid, group, History(Path("none"))) == Search(chosen=0.07)


def test_failed_and_diverged_rates_are_the_worst(tmp_path: Path) -> None:
    def score(rate: float, seed: int) -> list[tuple[float | None, float | None]] | None:
        if rate == 0.03:
            return None
        if rate == 0.3:
            return [(0.99, None)] * 3  # its loss is not a number
        return [(0.2 if rate == 0.1 else 0.1, 2.0)]

    state, _ = finished(tmp_path, [0.01, 0.03, 0.1, 0.3], score)
    assert state.chosen == 0.1
    assert [math.isnan(trial.value) for trial in state.trials] == [False, True, False, True]


def test_nothing_is_chosen_where_every_rate_failed(tmp_path: Path) -> None:
    state, asked = finished(tmp_path, [0.01, 0.1], lambda rate, seed: None)
    assert state.chosen is None
    assert asked == [0.01, 0.1]


def test_equal_accuracies_are_decided_by_the_smaller_loss(tmp_path: Path) -> None:
    losses = {0.01: 1.0, 0.03: 0.5, 0.1: 0.7}
    state, _ = finished(tmp_path, [0.01, 0.03, 0.1], lambda rate, seed: [(0.5, losses[rate])])
    assert state.chosen == 0.03


def test_the_last_three_evaluations_count_and_seeds_are_averaged(tmp_path: Path) -> None:
    def score(rate: float, seed: int) -> list[tuple[float | None, float | None]]:
        if rate == 0.03:  # 0.6 on average, though its last evaluation is poor
            return [(0.0, 1.0), (0.9, 1.0), (0.9, 1.0), (0.0, 1.0)]
        if rate == 0.1:  # 0.5 on average: brilliant with one seed, poor with the other
            return [(0.9 if seed % 2 else 0.1, 1.0)]
        return [(1.0, 1.0), (0.1, 1.0), (0.1, 1.0), (0.1, 1.0)]

    state, asked = finished(tmp_path, [0.01, 0.03, 0.1], score, seeds=2)
    assert state.chosen == 0.03
    assert [trial.value for trial in state.trials] == pytest.approx([0.1, 0.6, 0.5])
    assert len(asked) == 6


def test_cells_of_one_rate_have_one_seed_each() -> None:
    grid, group = setting([0.1, 0.3], seeds=3)
    assert [cell.config.seed for cell in search_cells(grid, group, 0.1)] == [1000, 1001, 1002]


def test_clients_own_models_decide_where_tensors_stay_with_them(tmp_path: Path) -> None:
    grid, group = setting([0.1, 0.3, 1.0])
    lines: list[dict[str, object]] = []
    # The global model is best at 0.1, the clients' own models are at 0.3.
    for rate, everyone, own in [(0.1, 0.9, 4), (0.3, 0.5, 8), (1.0, 0.6, 6)]:
        (cell,) = search_cells(grid, group, rate)
        clients = [{"client": 0, "examples": 10, "correct": own, "loss": 1.0}]
        summary = {"mean": own / 10, "worst_tenth": own / 10, "deviation": 0.0, "loss": 1.0}
        last = {"round": 5, "split": "validation"}
        lines += [
            {"cell": cell.id, **line}
            for line in (
                {"kind": "start", "purpose": "search", "config": {}, "local_tensors": 4},
                {"kind": "evaluation", **last, "accuracy": everyone, "loss": 1.0, "examples": 1},
                {"kind": "client_evaluation", **last, **summary, "clients": clients, "failed": []},
                {"kind": "end", "status": "completed"},
            )
        ]

    def chosen() -> float | None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
        history = History(tmp_path / "metrics.jsonl")
        history.poll()
        return search(grid, group, history).chosen

    assert chosen() == 0.3
    for line in lines:
        line.pop("local_tensors", None)
    # Now the best is at an end of the grid, and the next rate is asked for.
    assert chosen() is None


@pytest.mark.parametrize("best", [1000.0, 0.1, 0.03, 1e-9])
def test_where_lower_is_better_the_search_is_the_mirrored_one(tmp_path: Path, best: float) -> None:
    (tmp_path / "up").mkdir()
    (tmp_path / "down").mkdir()

    def score(rate: float, seed: int) -> list[tuple[float | None, float | None]] | None:
        # The first rate of the grid fails, before anything says which way is better.
        return None if rate == 0.01 else peak(best)(rate, seed)

    rates = [0.01, 0.03, 0.1, 0.3]
    up, asked = finished(tmp_path / "up", rates, score)
    down, asked_down = finished(tmp_path / "down", rates, score, mirrored=True)
    assert asked == asked_down
    assert (up.chosen, up.at_edge) == (down.chosen, down.at_edge)
    for one, other in zip(up.trials, down.trials, strict=True):
        assert (one.learning_rate, one.loss) == pytest.approx(
            (other.learning_rate, other.loss), nan_ok=True
        )
        assert one.value == pytest.approx(-other.value, nan_ok=True)
