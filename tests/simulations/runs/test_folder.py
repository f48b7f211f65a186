"""The run folder is read back as written, and survives kills, damage and foreign folders."""

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedkn.config import DataConfig, ExperimentConfig, PartitionConfig
from fedkn.errors import UserError
from server.run_data import hold_to_data, move_data
from simulations.runs.folder import RunFolder, write_json
from simulations.runs.records import GridRecord, PartitionRecord, partition_label
from simulations.runs.results import ClientResult
from tests.simulations.report.made_runs import data_named

GRID = GridRecord(
    "digits", "fedkn compare", ["kernel"], [2], ["iid, 2 clients"], [0], [0.1], {}, {}
)

BAD_TABLE = {"partition": "iid, 2 clients", "seed": 0, "classes": ["cat", "dog"]}


def append(folder: RunFolder, *lines: dict[str, Any] | str) -> None:
    with folder.metrics_path.open("a") as file:
        for line in lines:
            file.write(line if isinstance(line, str) else json.dumps(line) + "\n")


def start(cell: str = "c", **changes: Any) -> dict[str, Any]:
    config = ExperimentConfig.resolve(changes).flat()
    return {
        "cell": cell,
        "kind": "start",
        "time": 0.0,
        "purpose": "result",
        "config": config,
        "parameters": 10,
        "tensors": 3,
    }


def a_round(number: int, cell: str = "c", **changes: Any) -> dict[str, Any]:
    return {
        "cell": cell,
        "kind": "round",
        "round": number,
        "seconds": 1.0,
        "cohort": [0, 1],
        "updates": 2,
        "examples": 20,
        "steps": 10,
        "skipped_batches": 0,
        "skipped_examples": 0,
        "refused": [],
        "failed": [],
        "train_loss": 1.5,
        "bytes_down": 100,
        "bytes_up": 90,
        "train_seconds": 0.5,
        "learning_rate": 0.1,
    } | changes


def an_evaluation(number: int, accuracy: float | None, cell: str = "c") -> dict[str, Any]:
    return {
        "cell": cell,
        "kind": "evaluation",
        "round": number,
        "split": "test",
        "accuracy": accuracy,
        "loss": 1.0,
        "examples": 100,
    }


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", GRID)


def test_what_was_written_is_read_back(folder: RunFolder) -> None:
    table = PartitionRecord("iid, 2 clients", 0, ["cat", "dog"], [[1, 2], [3, 4]])
    folder.write_partitions([table])
    folder.write_environment({"torch": "2.13", "machine": {"cores": 2}})
    again = RunFolder.open(folder.path)
    assert again.grid == GRID
    assert again.partitions() == [table]
    assert again.environment() == {"torch": "2.13", "machine": {"cores": 2}}
    assert again.cells() == []


@pytest.mark.parametrize("content", [None, "", "[1]", "{}", '{"name": "x"}'])
def test_a_folder_that_is_no_run_folder_is_refused_and_left_alone(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "experiment.json").write_text(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError):
        RunFolder.open(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        RunFolder.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_create_does_not_write_into_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        RunFolder.create(tmp_path, GRID)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_cell_in_full(folder: RunFolder) -> None:
    memory = {"cell": "c", "kind": "memory", "peak_bytes": 4096, "batch_size": 2}
    end = {"cell": "c", "kind": "end", "status": "completed", "seconds": 9.0}
    lost = a_round(
        1,
        refused=[{"client": 3, "reason": "NaN"}],
        failed=[{"client": 4, "reason": "out of memory"}],
    )
    append(
        folder,
        start(seed=7),
        an_evaluation(0, 0.1),
        lost,
        an_evaluation(1, 0.6),
        memory,
        end | {"weights_sha256": "ab"},
    )
    (cell,) = folder.cells()
    assert (cell.id, cell.purpose, cell.status) == ("c", "result", "completed")
    assert cell.config.seed == 7
    assert cell.values("test") == {0: 0.1, 1: 0.6}
    assert cell.values("validation") == {}
    assert (cell.peak_bytes, cell.seconds, cell.weights_sha256) == (4096, 9.0, "ab")
    assert [asdict(loss) for loss in cell.rounds[0].refused] == lost["refused"]
    assert [asdict(loss) for loss in cell.rounds[0].failed] == lost["failed"]
    assert cell.rounds[0].cohort == (0, 1)


def test_of_a_repeated_round_the_later_line_counts(folder: RunFolder) -> None:
    append(folder, start(), a_round(1), a_round(2, train_loss=9.0), an_evaluation(2, 0.3))
    resume = {"cell": "c", "kind": "resume", "round": 1, "time": 1.0}
    append(folder, resume, a_round(2, train_loss=0.5), an_evaluation(2, 0.4), a_round(3))
    (cell,) = folder.cells()
    assert [(r.round, r.train_loss) for r in cell.rounds] == [(1, 1.5), (2, 0.5), (3, 1.5)]
    assert cell.values("test") == {2: 0.4}
    assert cell.resumes == 1


def test_a_resume_takes_back_the_end_of_a_failed_cell(folder: RunFolder) -> None:
    end = {"cell": "c", "kind": "end", "status": "failed", "seconds": 1.0, "error": "disk full"}
    append(folder, start(), end)
    assert [(c.status, c.error) for c in folder.cells()] == [("failed", "disk full")]
    append(folder, {"cell": "c", "kind": "resume", "round": 0, "time": 1.0})
    assert [c.status for c in folder.cells()] == ["unfinished"]


def test_the_clients_own_models_are_read(folder: RunFolder) -> None:
    result = {"client": 1, "examples": 8, "correct": 6, "loss": 0.5}
    line = {
        "cell": "c",
        "kind": "client_evaluation",
        "round": 2,
        "split": "test",
        "mean": 0.75,
        "worst_tenth": 0.75,
        "deviation": 0.0,
        "loss": None,
        "clients": [result],
        "failed": [{"client": 0, "reason": "not online"}],
    }
    append(folder, start() | {"local_tensors": 4}, line)
    (cell,) = folder.cells()
    own = cell.client_evaluation
    assert cell.local_tensors == 4
    assert own is not None
    assert (own.round, own.split, own.mean, own.deviation) == (2, "test", 0.75, 0.0)
    assert math.isnan(own.loss)
    assert own.clients == (ClientResult(1, 8, 0.75, 0.5),)
    assert [asdict(loss) for loss in own.failed] == line["failed"]


def test_what_later_versions_added_may_be_missing(folder: RunFolder) -> None:
    append(folder, start(), a_round(1))
    news = {"late": [3], "state_lost": [1], "epsilon": {"0": 1.5, "1": None}}
    append(folder, a_round(2, **news))
    (cell,) = folder.cells()
    old, new = cell.rounds
    assert (old.late, old.state_lost, old.epsilon) == ((), (), {})
    assert (new.late, new.state_lost, new.epsilon) == ((3,), (1,), {0: 1.5, 1: math.inf})
    assert (cell.local_tensors, cell.client_evaluation) == (None, None)


def test_damaged_lines_are_passed_over_and_counted(folder: RunFolder) -> None:
    append(folder, start(), "{not json\n", "[1, 2]\n", '{"cell": "c", "kind": "song"}\n', "\n")
    append(folder, '{"cell": "c", "kind": "round", "round": 5}\n', a_round(1))
    append(folder, json.dumps(a_round(2))[:40])
    (cell,) = folder.cells()
    assert [r.round for r in cell.rounds] == [1]
    tail = folder.tail()
    tail.poll()
    assert tail.skipped == 4


def test_every_cut_of_the_file_can_be_read(folder: RunFolder) -> None:
    append(folder, start(), a_round(1), an_evaluation(1, 0.5))
    whole = folder.metrics_path.read_bytes()
    for cut in range(0, len(whole), 7):
        folder.metrics_path.write_bytes(whole[:cut])
        assert len(folder.cells()) == (whole[:cut].count(b"\n") > 0)


def test_nan_in_either_spelling(folder: RunFolder) -> None:
    append(folder, start(), a_round(1, train_loss=math.nan), a_round(2, train_loss=None))
    append(folder, an_evaluation(1, None))
    (cell,) = folder.cells()
    assert all(math.isnan(r.train_loss) for r in cell.rounds)
    assert math.isnan(cell.values("test")[1])


def test_an_untrainable_cell_that_never_started_has_its_config(folder: RunFolder) -> None:
    folder.write_cell_config("bn", ExperimentConfig.resolve({"normalizer.name": "batch"}))
    append(folder, {"cell": "bn", "kind": "end", "status": "untrainable", "error": "batch of 1"})
    (cell,) = folder.cells()
    assert (cell.status, cell.config.normalizer.name, cell.rounds) == ("untrainable", "batch", [])


def test_a_search_cell_that_never_started_is_no_result(folder: RunFolder) -> None:
    folder.write_cell_config("s", ExperimentConfig.resolve({"evaluation.split": "validation"}))
    append(folder, {"cell": "s", "kind": "end", "status": "failed", "error": "killed"})
    assert [cell.purpose for cell in folder.cells()] == ["search"]


def test_what_a_cell_that_failed_at_once_was_to_do_stands_in_its_last_line(
    folder: RunFolder,
) -> None:
    end = {"cell": "bn", "kind": "end", "status": "failed", "error": "two dtypes"}
    append(folder, start(), end | {"config": {"normalizer.name": "batch"}}, end | {"cell": "old"})
    began, failed = folder.cells()  # of "old", of an older fedkn, nobody knows what it was to do
    assert (failed.id, failed.status, failed.error) == ("bn", "failed", "two dtypes")
    assert failed.config.normalizer.name == "batch"
    assert began.status == "unfinished"


def test_a_cell_without_any_config_is_an_error_that_names_the_file(folder: RunFolder) -> None:
    append(folder, a_round(1))
    with pytest.raises(UserError, match=r"cells/c/config\.json"):
        folder.cells()


def test_the_tail_gives_each_line_once_and_waits_for_the_newline(folder: RunFolder) -> None:
    tail = folder.tail()
    assert tail.poll() == []
    append(folder, start())
    text = json.dumps(a_round(1)) + "\n"
    append(folder, text[:30])
    assert [line["kind"] for line in tail.poll()] == ["start"]
    assert tail.poll() == []
    append(folder, text[30:], a_round(2))
    assert [line["round"] for line in tail.poll()] == [1, 2]
    assert tail.skipped == 0


def test_labels_tell_partitions_apart() -> None:
    variants = [
        {},
        {"alpha": 0.6},
        {"clients": 10},
        {"minimum": 4},
        {"scheme": "iid"},
        {"scheme": "shards"},
        {"scheme": "shards", "shards_per_client": 3},
        {"scheme": "quantity"},
        {"scheme": "quantity", "sigma": 0.5},
    ]
    labels = [partition_label(PartitionConfig.model_validate(variant)) for variant in variants]
    assert len(set(labels)) == len(labels)
    # A setting that the scheme does not use makes no other partition.
    assert partition_label(PartitionConfig(scheme="iid", alpha=9.0)) == labels[4]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot make the run folder"):
        RunFolder.create(tmp_path / "run", GRID)


class Killed(BaseException):
    """What a kill is to the code that it hits: nothing after it runs."""


def begin(path: Path) -> RunFolder:
    table = PartitionRecord("iid, 2 clients", 0, ["cat", "dog"], [[1, 2], [3, 4]])
    with RunFolder.creating(path, GRID) as folder:
        write_json(path / "grid.json", {"rounds": 3})
        folder.write_partitions([table])
        folder.write_environment({"torch": "2.13"})
    return folder


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("writes", range(4))
def test_a_disk_that_is_full_at_the_beginning_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int, there: bool
) -> None:
    path = tmp_path / "run"
    if there:
        path.mkdir()
    left = iter(range(writes))

    def nearly_full(to: Path, content: bytes) -> None:
        if next(left, None) is None:
            to.write_bytes(content[:3])
            raise OSError(28, "No space left on device", str(to))
        to.write_bytes(content)

    with monkeypatch.context() as full:
        full.setattr("simulations.runs.folder.write_atomically", nearly_full)
        with pytest.raises(UserError, match="No space left on device"):
            begin(path)
    assert sorted(tmp_path.rglob("*")) == ([path] if there else [])
    assert begin(path).grid == GRID


@pytest.mark.parametrize("writes", range(4))
def test_a_beginning_that_was_killed_can_be_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    path = tmp_path / "run"
    left = iter(range(writes))

    def killed(to: Path, content: bytes) -> None:
        if next(left, None) is None:
            raise Killed
        to.write_bytes(content)

    with monkeypatch.context() as kill:
        kill.setattr("simulations.runs.folder.write_atomically", killed)
        with pytest.raises(Killed):
            begin(path)
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(path)
    (path / "data.json").write_text("what the killed one was to train on")
    folder = begin(path)
    assert not (path / "data.json").exists()
    assert RunFolder.open(path).partitions() == folder.partitions()
    assert not (path / ".beginning").exists()
    # Now it is a run, which nobody overwrites.
    with pytest.raises(UserError, match="exists already"):
        begin(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("experiment.json", asdict(GRID) | {"seeds": "0"}),
        ("experiment.json", asdict(GRID) | {"normalizers": [1]}),
        ("experiment.json", asdict(GRID) | {"more": 1}),
        ("partition.json", {"partitions": None}),
        ("partition.json", {"partitions": [{"partition": "x"}]}),
        ("partition.json", {"partitions": [{**BAD_TABLE, "counts": [[1], [1, 2]]}]}),
        ("partition.json", {"partitions": [{**BAD_TABLE, "counts": [[-1, 2]]}]}),
        ("partition.json", {"partitions": [{**BAD_TABLE, "counts": [["1", 2]]}]}),
        ("environment.json", [1]),
    ],
)
def test_a_file_with_values_of_another_type_is_named(
    folder: RunFolder, name: str, content: Any
) -> None:
    (folder.path / name).write_text(json.dumps(content))
    with pytest.raises(UserError) as refusal:
        _ = folder.grid, folder.partitions(), folder.environment()
    assert "\n" not in str(refusal.value)
    assert str(folder.path) in str(refusal.value)


def test_a_file_nested_too_deeply_is_named(folder: RunFolder) -> None:
    (folder.path / "partition.json").write_text('{"partitions":' + "[" * 100_000)
    with pytest.raises(UserError, match=r"partition\.json"):
        folder.partitions()


def test_names_that_are_not_utf_8_are_kept(tmp_path: Path) -> None:
    odd = replace(GRID, name=os.fsdecode(b"caf\xe9"), command="fedkn compare \U0001f600")
    folder = RunFolder.create(tmp_path / odd.name, odd)
    assert RunFolder.open(folder.path).grid == odd


def test_cells_that_were_trained_before_a_move_know_their_data(tmp_path: Path) -> None:
    here = DataConfig(source="image_folder", root="/here")
    there = here.model_copy(update={"root": "/there"})
    hold_to_data(tmp_path, here, data_named("the same"))
    move_data(tmp_path, "/there", [(there, data_named("the same"))])
    run = RunFolder(tmp_path)
    assert run.data_of(there) == data_named("the same")
    assert run.data_of(here) == data_named("the same")
    assert run.data_of(here.model_copy(update={"test_limit": 7})) is None
    # Where several differ in their place alone, it tells them apart, and nothing is guessed.
    other = here.model_copy(update={"root": "/other"})
    hold_to_data(tmp_path, other, data_named("another"))
    assert run.data_of(other) == data_named("another")
    assert run.data_of(there) == data_named("the same")
    assert run.data_of(here) is None
