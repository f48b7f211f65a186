"""Cells of a comparison on several GPUs, and several on one: with fake GPUs, real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedkn.errors import UserError
from simulations.runs.folder import RunFolder
from tests.simulations.fake_gpu_cells import GIB
from tests.simulations.fake_runs import Recorder, make_run, run_cells

RUNNER = "tests.simulations.fake_gpu_cells:run_cell"


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts fake GPUs into this machine: by name their kind and GiB."""

    def put(**named: tuple[str, int]) -> Path:
        folder = tmp_path / "gpus"
        folder.mkdir()
        for name, (kind, size) in named.items():
            if kind:
                content = json.dumps({"kind": kind, "memory": size * GIB}) + "\n"
                (folder / name).write_text(content)
        monkeypatch.setenv("FAKE_GPUS", str(folder))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(named))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(named))
        return folder

    return put


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def most_at_once(noted: list[dict]) -> int:
    running: set[str] = set()
    most = 0
    for line in noted:
        (running.add if line["what"] == "begins" else running.discard)(line["cell"])
        if line["what"] == "takes":
            running.add(line["cell"])
        most = max(most, len(running))
    return most


def test_cells_take_turns_on_all_gpus_and_share_one_where_they_fit(tmp_path: Path, gpus) -> None:
    folder = gpus(a=("H100", 5), b=("H100", 5), c=("T4", 5), d=("", 0))
    make_run(
        tmp_path / "r",
        compare__seeds=7,
        compare__learning_rates=0.1,
        compare__workers=6,
        rounds=4,
        train__momentum=0.15,
    )
    watcher = Recorder()
    assert run_cells(tmp_path / "r", watcher, runner=RUNNER).completed == 7
    first, second = lines(folder / "a"), lines(folder / "b")
    assert {line["cell"] for line in first} | {line["cell"] for line in second} == {
        cell.id for cell in RunFolder.open(tmp_path / "r").cells()
    }
    assert lines(folder / "c") == []
    # 5 GiB hold two cells of 1 GiB with margin and what CUDA itself takes, not three.
    assert most_at_once(first) == 2
    assert most_at_once(second) == 2
    # The first cell of each ran by itself until it had shown what it takes.
    assert [line["cell"] for line in first[:3]] == [first[0]["cell"]] * 3
    left_out = sorted(notice for notice in watcher.notices if "left out" in notice)
    assert len(left_out) == len(watcher.notices) == 2
    assert "GPU c is left out: it is another kind (T4, compute" in left_out[0]
    assert left_out[1] == "GPU d is left out: PyTorch sees no CUDA device there"


def test_a_cell_whose_gpu_was_full_runs_again_alone_and_nothing_is_lost(
    tmp_path: Path, gpus
) -> None:
    # Two fit by what is seen of the first, until both take twice that.
    folder = gpus(a=("H100", 16))
    make_run(
        tmp_path / "r",
        compare__seeds=2,
        compare__learning_rates=0.1,
        compare__normalizers="layer",
        compare__workers=2,
        rounds=6,
        train__momentum=0.3,
    )
    watcher = Recorder()
    assert run_cells(tmp_path / "r", watcher, runner=RUNNER).completed == 2
    noted = lines(folder / "a")
    assert most_at_once(noted) == 2
    (notice,) = watcher.notices
    assert "its GPU was full beside 1 other cell: it is run again from its checkpoint" in notice
    cells = {cell.id: cell for cell in RunFolder.open(tmp_path / "r").cells()}
    (full,) = [cell for cell in cells.values() if cell.warnings]
    assert full.status == "completed"
    assert notice.startswith(full.id)
    # Nobody else was there from the moment it began again.
    again = [at for at, line in enumerate(noted) if line["what"] == "begins"][-1]
    assert {line["cell"] for line in noted[again:]} == {full.id}


def test_a_cell_that_not_even_an_empty_gpu_holds_fails_with_the_reason(
    tmp_path: Path, gpus
) -> None:
    gpus(a=("H100", 16))
    make_run(
        tmp_path / "r",
        compare__seeds=1,
        compare__learning_rates=0.1,
        compare__normalizers="rms",
        compare__workers=2,
    )
    watcher = Recorder()
    assert run_cells(tmp_path / "r", watcher, runner=RUNNER).failed == 1
    (cell,) = RunFolder.open(tmp_path / "r").cells()
    assert cell.error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert cell.resumes == 0


def test_a_comparison_whose_gpus_cannot_be_used_says_so_before_a_cell_begins(
    tmp_path: Path, gpus
) -> None:
    gpus(a=("", 0))
    make_run(tmp_path / "r", compare__seeds=1, compare__learning_rates=0.1)
    with pytest.raises(UserError, match=r"GPU a is left out: .*give device = 'cpu'"):
        run_cells(tmp_path / "r", runner=RUNNER)
    assert not (tmp_path / "r" / "metrics.jsonl").exists()
