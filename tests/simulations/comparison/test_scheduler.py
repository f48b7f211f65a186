import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedkn.errors import UserError
from fedkn.locks import held
from fedkn.machine import usable_cores
from simulations.runs.folder import RunFolder
from simulations.runs.records import CellRecord
from tests.simulations.fake_runs import Recorder, make_run, run_cells

RESULTS = ["kernel-b2-dirichlet0.3-s0", "kernel-b2-dirichlet0.3-s1"]


def cells(path: Path) -> dict[str, CellRecord]:
    return {cell.id: cell for cell in RunFolder.open(path).cells()}


def hashes(path: Path) -> dict[str, str | None]:
    return {name: cell.weights_sha256 for name, cell in cells(path).items()}


def test_searches_then_measures_at_the_chosen_rate(tmp_path: Path) -> None:
    # Cells long enough for the second worker to start beside the first, also on a busy machine.
    make_run(
        tmp_path / "r",
        compare__seeds=2,
        compare__learning_rates=[0.03, 0.1, 0.3],
        train__momentum=0.7,
    )
    watcher = Recorder()
    totals = run_cells(tmp_path / "r", watcher)
    assert (totals.completed, totals.failed, totals.untrainable) == (2, 0, 0)
    done = cells(tmp_path / "r")
    assert sorted(name for name in done if not name.startswith("search-")) == RESULTS
    assert len(done) == 5
    for name, cell in done.items():
        search = name.startswith("search-")
        assert cell.purpose == ("search" if search else "result")
        assert cell.config.evaluation.split == ("validation" if search else "test")
        # Two cells at once share the cores.
        assert cell.config.workers == max(1, usable_cores() // 2)
        if not search:
            assert cell.config.train.learning_rate == 0.1
    assert watcher.most_running == 2
    assert watcher.notices == []


def test_search_checkpoints_are_removed_and_result_checkpoints_kept(tmp_path: Path) -> None:
    make_run(tmp_path / "r", compare__seeds=1, compare__learning_rates=[0.03, 0.1, 0.3])
    run_cells(tmp_path / "r")
    kept = {path.parent.name for path in (tmp_path / "r").rglob("checkpoint-*")}
    assert kept == {RESULTS[0]}


def test_failed_cells_are_recorded_and_do_not_stop_the_others(tmp_path: Path) -> None:
    make_run(
        tmp_path / "r",
        compare__seeds=1,
        compare__learning_rates=0.1,
        compare__normalizers="none,instance,group,layer,kernel,batch",
        compare__batch_sizes="1",
    )
    watcher = Recorder()
    totals = run_cells(tmp_path / "r", watcher)
    assert (totals.completed, totals.failed, totals.untrainable) == (2, 3, 1)
    done = {cell.config.normalizer.name: cell for cell in cells(tmp_path / "r").values()}
    assert done["kernel"].status == "completed"
    # Its process was killed once; it went on from its checkpoint.
    assert (done["layer"].status, done["layer"].resumes) == ("completed", 1)
    assert done["none"].status == "failed"
    assert done["none"].error == "no valid update in the last round"
    assert done["instance"].error == "ZeroDivisionError: a bug"
    assert done["group"].status == "failed"
    assert "SIGSEGV" in (done["group"].error or "")
    assert done["group"].resumes == 1
    assert done["batch"].status == "untrainable"
    assert "at least 2" in (done["batch"].error or "")
    log = (tmp_path / "r" / "log.txt").read_text()
    assert "ZeroDivisionError" in log
    assert "in run_cell" in log
    assert sum("failed" in notice for notice in watcher.notices) == 3


def test_group_whose_every_rate_fails_is_failed_until_a_resume(tmp_path: Path) -> None:
    _, run = make_run(tmp_path / "r", compare__seeds=2, compare__learning_rates=[0.03, 0.1, 0.3])
    (tmp_path / "r" / "cells").rmdir()
    (tmp_path / "r" / "cells").write_text("")  # no cell can write here
    assert run_cells(tmp_path / "r").failed == 2
    assert [cell.status for cell in run.cells()] == ["failed"] * 5
    assert {c.config.normalizer.name for c in run.cells() if c.purpose == "result"} == {"kernel"}
    (tmp_path / "r" / "cells").unlink()
    assert run_cells(tmp_path / "r").completed == 2


def test_resume_of_a_complete_run_does_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "r", compare__seeds=1, compare__learning_rates=[0.03, 0.1, 0.3])
    run_cells(tmp_path / "r")
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    assert run_cells(tmp_path / "r").completed == 1
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before


def test_failed_cells_are_tried_again_by_a_resume(tmp_path: Path) -> None:
    make_run(
        tmp_path / "r",
        compare__seeds=1,
        compare__learning_rates=0.1,
        compare__normalizers="none,kernel",
    )
    assert run_cells(tmp_path / "r").failed == 1
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().count('"end"')
    assert run_cells(tmp_path / "r").failed == 1
    assert (tmp_path / "r" / "metrics.jsonl").read_text().count('"end"') == lines + 1


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_stopped_run_leaves_no_process_and_resumes_to_the_same_numbers(
    tmp_path: Path, number: int, code: int
) -> None:
    settings = {
        "compare__seeds": 2,
        "compare__learning_rates": [0.03, 0.1, 0.3],
        "train__momentum": 0.05,
    }
    make_run(tmp_path / "whole", **settings)
    run_cells(tmp_path / "whole")
    make_run(tmp_path / "stopped", **settings)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.simulations.fake_runs", str(tmp_path / "stopped")]
    )
    wait_until(lambda: metrics.exists() and b"round" in metrics.read_bytes())
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    os.kill(process.pid, number)
    assert process.wait(60) == code
    wait_until(lambda: not any(alive(worker) for worker in workers))
    unfinished = [
        cell for cell in cells(tmp_path / "stopped").values() if cell.status != "completed"
    ]
    assert unfinished
    assert run_cells(tmp_path / "stopped").completed == 2
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")


def test_two_processes_do_not_run_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "r", compare__learning_rates=0.1)
    monkeypatch.setattr("fedkn.locks._PATIENCE_SECONDS", 0.2)
    with held(tmp_path / "r"), pytest.raises(UserError, match="another process"):
        run_cells(tmp_path / "r")
    assert run_cells(tmp_path / "r").completed == 5


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
