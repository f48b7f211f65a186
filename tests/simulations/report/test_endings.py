"""Whether a cell ended flat or because its rounds ran out: as the server decided, and seen."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedkn.config import ExperimentConfig
from fedkn.seeds import numpy_generator
from fedkn.tasks.metric import ACCURACY
from server.choice import Choice
from simulations.report import build_report, summary_dict, summary_table
from simulations.report.endings import convergence, ending_of, not_converged
from simulations.report.summary import summarize
from simulations.runs.folder import RunFolder
from simulations.runs.records import GridRecord, partition_label

PATIENCE = 3


def judged(values: list[float], rounds: int, patience: int) -> tuple[Choice, int]:
    """What the server's choice makes of these validation values, and the round that it ends in."""
    choice = Choice()
    for number, value in enumerate(values[:rounds], 1):
        choice = choice.after(number, value, {}, metric=ACCURACY, keep=False)
        if patience and choice.waited >= patience:
            return choice, number
    return choice, rounds


def run_of(path: Path, curves: dict[str, list[list[float]]], **settings: Any) -> RunFolder:
    """A run whose cells have these values on validation examples, and half of them on test ones."""
    named = {key.replace("__", "."): value for key, value in settings.items()}
    base = ExperimentConfig.resolve({"rounds": 10, **named})
    grid = GridRecord(
        name=path.name,
        command="fedkn compare",
        normalizers=list(curves),
        batch_sizes=[2],
        partitions=[partition_label(base.partition)],
        seeds=list(range(max(map(len, curves.values())))),
        learning_rates=[0.1],
        search={},
        experiment=dict(base.flat()),
    )
    run = RunFolder.create(path, grid)
    lines: list[dict[str, Any]] = []
    for name, seeds in curves.items():
        for seed, values in enumerate(seeds):
            config = base.overlay(normalizer__name=name, train__batch_size=2, seed=seed)
            choice, last = judged(values, config.rounds, config.evaluation.patience)
            cell: list[dict[str, Any]] = [
                {"kind": "start", "purpose": "result", "config": config.flat()}
            ]
            for number, value in enumerate(values[:last], 1):
                splits = {"test": value / 2, "validation": value}
                cell += [
                    {"kind": "evaluation", "round": number, "split": split, "loss": 1.0}
                    | {"metrics": {"accuracy": of}, "examples": 9}
                    for split, of in splits.items()
                ]
            end = {"kind": "end", "status": "completed", "seconds": 1.0, "weights_sha256": "0" * 64}
            if config.chooses:
                end |= {"rounds": last, "best_round": choice.round_, "best_value": choice.value}
            lines += [{"cell": f"{name}-s{seed}", **line} for line in [*cell, end]]
    with run.metrics_path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return run


RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.82, 0.84]
FLAT = [0.1, 0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
# The third evaluation without a better one is that of the last round.
JUST = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9, 0.8, 0.7, 0.6]


def test_flat_is_what_the_server_took_for_flat(tmp_path):
    generator = numpy_generator(5, "curves")
    curves = [np.round(generator.uniform(0, 1, 10), 1).tolist() for _ in range(40)]
    run = run_of(tmp_path / "run", {"kernel": curves}, evaluation__patience=PATIENCE)
    cells = run.cells()
    expected = [judged(values, 10, PATIENCE)[0].waited >= PATIENCE for values in curves]
    assert [cell.flat for cell in cells] == expected
    assert len(set(expected)) == 2


@pytest.mark.parametrize("best", [True, False])
def test_best_and_last_stand_beside_each_other(tmp_path, best):
    run = run_of(
        tmp_path / "run",
        {"kernel": [FLAT, JUST], "group": [RISING, FLAT], "none": [RISING, RISING]},
        evaluation__patience=PATIENCE,
        checkpoint__best=best,
    )
    (summary,) = summarize([run])
    (section,) = summary.sections
    kernel, group, none = (ending_of(section.entries[n, 2]) for n in ("kernel", "group", "none"))
    assert kernel is not None
    assert group is not None
    assert none is not None
    assert (kernel.last, kernel.best, kernel.why) == ("6, 10", "3, 7", "flat")
    assert kernel.at_best.mean == pytest.approx((0.9 + 0.9) / 4)
    assert kernel.at_last.mean == pytest.approx((0.6 + 0.6) / 4)
    assert (group.flat, group.ran_out) == (1, 1)
    assert group.why == "not converged: rounds ran out (1 of 2)"
    assert none.why == "not converged: rounds ran out (all)"
    # What the cell's result is, is one of the two.
    result = section.entries["kernel", 2].accuracy.mean
    assert result == (kernel.at_best if best else kernel.at_last).mean


def test_what_did_not_converge_is_seen_everywhere(tmp_path):
    curves = {"kernel": [FLAT, JUST], "none": [RISING, FLAT]}
    run = run_of(tmp_path / "run", curves, evaluation__patience=PATIENCE)
    sentence = (
        "Not converged: 1 of 4 result cells was still getting better when the rounds ran out: "
        "none at batch size 2 (1 of 2). The order may change with more rounds"
    )
    (summary,) = summarize([run])
    assert not_converged(summary) == sentence
    page = build_report(run).read_text(encoding="utf-8")
    assert f'<p class="banner">{sentence}.</p>' in page
    assert page.count("<small>not converged</small>") == 1
    assert "until 3 evaluations on validation examples without a better one" in page
    console = Console(record=True, width=1000, file=io.StringIO())
    console.print(summary_table(run))
    assert sentence in console.export_text()
    told = summary_dict(run)
    assert told["convergence"] == convergence(summary)
    assert "3 of 4 result cells ended because the curve was flat" in told["convergence"][0]
    entries = {of["normalizer"]: of["ending"] for of in told["partitions"][0]["entries"]}
    assert (entries["none"]["flat"], entries["none"]["ran_out"]) == (1, 1)
    assert (entries["kernel"]["flat"], entries["kernel"]["ran_out"]) == (2, 0)


def test_where_nothing_judged_it_that_is_said(tmp_path):
    run = run_of(tmp_path / "run", {"kernel": [RISING], "none": [FLAT]})
    (summary,) = summarize([run])
    assert [cell.flat for cell in run.cells()] == [None, None]
    assert not_converged(summary) == ""
    (sentence,) = convergence(summary)
    assert "nothing judged whether the curve was flat" in sentence
    assert "all of the 10 rounds were run" in sentence
    page = build_report(run).read_text(encoding="utf-8")
    assert sentence in page
    assert "not converged" not in page.lower()
