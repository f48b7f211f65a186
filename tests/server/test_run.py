"""Whole runs: what is logged, killed and resumed, on full disks, with bad input."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError, UserError
from server import checkpoints
from server.checkpoints import CheckpointNotWritten, CheckpointStore, weights_sha256
from server.metrics_log import LogNotWritten
from server.rounds.membership import ClientsMissing
from server.run import run_server
from tests.full_disk import fill, small_file_system
from tests.server.fake_grid import FakeGrid, run, small

REPOSITORY = Path(__file__).parents[2]


def log_of(folder: Path, kind: str | None = None) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if kind in (None, line["kind"])]


def logged(folder: Path, **changes) -> ExperimentConfig:
    return small(checkpoint__folder=str(folder), **changes)


def cell(folder: Path) -> Path:
    return folder / "cells" / "experiment"


# -- what a run is --------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    one, two = run(small()), run(small())
    assert one.weights_sha256 == two.weights_sha256 == weights_sha256(one.tensors)
    assert one.evaluation == two.evaluation
    assert run(small(seed=1)).weights_sha256 != one.weights_sha256


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(small())
    assert not list(tmp_path.iterdir())


def test_the_log_tells_the_run(tmp_path):
    config = logged(tmp_path, rounds=3, evaluation__every=2, train__schedule="exponential")
    outcome = run(config)
    lines = log_of(tmp_path)
    kinds = ["start", "memory", "evaluation", "joined", "round", "round", "evaluation", "round"]
    assert [line["kind"] for line in lines] == [*kinds, "evaluation", "end"]
    start = lines[0]
    assert start["config"] == config.flat()
    assert start["purpose"] == "result"
    assert start["tensors"] == len(outcome.tensors)
    assert start["parameters"] == sum(value.size for value in outcome.tensors.values())
    sent = sum(value.nbytes for value in outcome.tensors.values())
    for number, line in enumerate(log_of(tmp_path, "round"), 1):
        assert line["round"] == number
        assert len(line["cohort"]) == line["updates"] == 3
        assert (line["steps"], line["examples"]) == (9, 18)
        assert line["learning_rate"] == pytest.approx(0.05 * 0.998 ** (number - 1))
        # Data, and less than 200 bytes of header for each array.
        for key in ("bytes_down", "bytes_up"):
            assert 3 * sent < line[key] < 3 * (sent + 200 * len(outcome.tensors))
    assert lines[-1]["status"] == "completed"
    assert lines[-1]["weights_sha256"] == outcome.weights_sha256
    assert lines[-2]["metrics"]["accuracy"] == outcome.evaluation.value
    assert json.loads((cell(tmp_path) / "config.json").read_text())["rounds"] == 3


def test_durations_bear_a_clock_that_is_set_back(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", itertools.count(2e9, -3600.0).__next__)
    began = time.monotonic()
    run(logged(tmp_path, rounds=2))
    took = time.monotonic() - began
    (end,) = log_of(tmp_path, "end")
    assert 0 < end["seconds"] <= took
    assert all(0 < line["seconds"] <= took for line in log_of(tmp_path, "round"))


def test_batches_too_small_for_the_normalizer_are_counted(tmp_path):
    config = logged(
        tmp_path,
        normalizer__name="batch",
        train__batch_size=1,
        train__local_steps=0,
        server__max_failed_rounds=1,
    )
    with pytest.raises(FedknError, match="every batch was smaller than the normalizer needs"):
        run(config)
    (line,) = log_of(tmp_path, "round")
    assert line["updates"] == 0
    assert len(line["refused"]) == 3


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer__name": "kernal"}, "did you mean 'kernel'"),
        ({"model__name": "resnet9"}, "did you mean 'resnet"),
        ({"strategy__name": "fedvag"}, "did you mean 'fedavg'"),
        ({"data__source": "digit"}, "did you mean 'digits'"),
        ({"partition__scheme": "dirichelt"}, "did you mean 'dirichlet'"),
        ({"device": "cuda:99"}, "CUDA"),
        ({"device": "tpu"}, "give auto, cpu, cuda"),
        ({"evaluation__split": "validation", "data__validation_fraction": 0.0}, "raise it"),
        ({"partition__clients": 900, "cohort": 3}, "partition"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(changes, message, tmp_path):
    folder = tmp_path / "run"
    config = logged(folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        run_server(FakeGrid(small()), config)
    assert "\n" not in str(caught.value)
    assert not folder.exists()


def test_a_failure_in_an_existing_run_folder_is_logged(tmp_path):
    with pytest.raises(UserError):
        run(logged(tmp_path, normalizer__name="kernal"))
    (end,) = log_of(tmp_path)
    assert (end["kind"], end["status"]) == ("end", "failed")
    assert "did you mean 'kernel'" in end["error"]
    # No line before it says what the run was to do.
    assert end["config"]["normalizer.name"] == "kernal"


def test_missing_clients_end_the_run(tmp_path):
    config = logged(tmp_path, server__join_timeout=0.1)
    grid = FakeGrid(config)
    grid.nodes.pop(2)
    with pytest.raises(ClientsMissing, match="partitions 2"):
        run_server(grid, config)
    (end,) = log_of(tmp_path, "end")
    assert end["status"] == "failed"
    assert "config" not in end


def test_a_resume_with_another_configuration_is_refused_naming_the_key(tmp_path):
    run(logged(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"begun with train\.batch_size = 2, not 4"):
        run(logged(tmp_path, train__batch_size=4))
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before)
    # How often it writes is no part of what it computes.
    run(logged(tmp_path, checkpoint__keep=5, checkpoint__every=2))


# -- resume ---------------------------------------------------------------------------------------


def test_a_last_evaluation_that_the_log_has_lost_is_made_again(tmp_path):
    run(logged(tmp_path))
    (last,) = [e for e in log_of(tmp_path, "evaluation") if e["round"] == 2]
    log = tmp_path / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["kind"] not in ("evaluation", "end")]
    log.write_text("".join(kept))
    run(logged(tmp_path))
    (again,) = log_of(tmp_path, "evaluation")
    assert (again["round"], again["metrics"]) == (2, last["metrics"])


def stop_in(round_: int, stop) -> object:
    """Call `stop` in the middle of `round_`: when the second of its clients has trained."""
    trained: list[int] = []

    def tamper(number: int, partition: int, message: Message, reply: Message) -> Iterable[Message]:
        if number == round_:
            trained.append(partition)
            if len(trained) == 2:
                stop()
        return [reply]

    return tamper


class Crash(BaseException):
    pass


def crash() -> None:
    raise Crash


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("round_", [1, 2, 4, 5])
def test_a_run_that_crashed_ends_in_the_same_weights(every, round_, tmp_path):
    config = logged(tmp_path, rounds=5, checkpoint__every=every, normalizer__name="batch")
    with pytest.raises(Crash):
        run(config, stop_in(round_, crash))
    outcome = run(config)
    undisturbed = run(config.overlay(checkpoint__folder=""))
    assert outcome.weights_sha256 == undisturbed.weights_sha256
    assert outcome.evaluation == undisturbed.evaluation
    resumed = [line["round"] for line in log_of(tmp_path, "resume")]
    assert resumed == [r for r in [(round_ - 1) // every * every] if r]


def test_a_completed_run_runs_no_round_again(tmp_path):
    config = logged(tmp_path)
    first = run(config)
    grid = FakeGrid(config)
    grid.nodes = []  # nobody is needed
    again = run_server(grid, config)
    assert again.weights_sha256 == first.weights_sha256
    assert again.evaluation == first.evaluation
    assert [line["round"] for line in log_of(tmp_path, "round")] == [1, 2]


def test_rounds_that_brought_nothing_are_tried_again(tmp_path):
    config = logged(tmp_path, rounds=4, server__max_failed_rounds=2, strategy__name="fedadam")
    silent = {2, 3}
    with pytest.raises(FedknError, match=r"in the last 2 round"):
        run(config, lambda round_, p, message, reply: [] if round_ in silent else [reply])
    undisturbed = run(config.overlay(checkpoint__folder=""))
    assert run(config).weights_sha256 == undisturbed.weights_sha256
    assert [line["round"] for line in log_of(tmp_path, "round")] == [1, 2, 3, 2, 3, 4]


def test_a_damaged_newest_checkpoint_costs_a_round_not_the_run(tmp_path):
    config = logged(tmp_path, rounds=4)
    with pytest.raises(Crash):
        run(config, stop_in(4, crash))
    newest = max(cell(tmp_path).glob("checkpoint-*"))
    newest.write_bytes(newest.read_bytes()[:-3])
    undisturbed = run(config.overlay(checkpoint__folder=""))
    assert run(config).weights_sha256 == undisturbed.weights_sha256
    assert [line["round"] for line in log_of(tmp_path, "resume")] == [2]
    assert len(list(cell(tmp_path).glob("checkpoint-*"))) == config.checkpoint.keep


# -- kill -9 --------------------------------------------------------------------------------------

_CHILD = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from server import checkpoints
from tests.server.fake_grid import run
from tests.server.test_run import stop_in
from fedkn.config import ExperimentConfig

def die():
    os.kill(os.getpid(), signal.SIGKILL)

for given in map(json.loads, sys.argv[1:]):
    config = ExperimentConfig.resolve(given)
    child = os.fork()
    if child == 0:
        if config.checkpoint.cell == "mid-save":
            replace = checkpoints.Path.replace
            def die_at_round_three(path, target):
                if "000003" in path.name:
                    die()
                return replace(path, target)
            checkpoints.Path.replace = die_at_round_three
            run(config)
        else:
            run(config, stop_in(3, die))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
print("killed")
"""


def killed_configs(folder: Path) -> dict[str, ExperimentConfig]:
    common = {"rounds": 4, "normalizer__name": "batch"}
    return {
        name: logged(folder, checkpoint__cell=name, strategy__name=strategy, **common)
        for name, strategy in (
            ("mid-round", "fedavg"),
            ("mid-save", "fedavg"),
            ("fedadam", "fedadam"),
            ("fedavgm", "fedavgm"),
        )
    }


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder with runs in real processes that were killed with SIGKILL in round 3 of 4."""
    folder = tmp_path_factory.mktemp("killed")
    given = [json.dumps(config.flat()) for config in killed_configs(folder).values()]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *given],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("killed\n"), done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mid-round", "mid-save", "fedadam", "fedavgm"])
def test_a_killed_run_ends_in_the_same_weights(name, killed):
    config = killed_configs(killed)[name]
    place = killed / "cells" / name
    assert bool(list(place.glob(".*.part"))) == (name == "mid-save")
    outcome = run(config)
    assert outcome.weights_sha256 == run(config.overlay(checkpoint__folder="")).weights_sha256
    mine = [line for line in log_of(killed) if line["cell"] == name]
    assert [line["round"] for line in mine if line["kind"] == "resume"] == [2]
    assert not list(place.glob(".*.part"))


# -- full and read-only disks ---------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    with small_file_system(place, "400k"):
        yield place


def test_a_full_disk_ends_the_run_and_a_resume_goes_on(small_disk):
    config = logged(small_disk, rounds=4)
    with pytest.raises((CheckpointNotWritten, LogNotWritten), match="No space left on device"):
        run(config, stop_in(3, lambda: fill(small_disk)))
    whole = CheckpointStore(
        cell(small_disk), 2, json.loads((cell(small_disk) / "config.json").read_text())
    ).load_newest()
    assert whole is not None
    assert whole.round_ == 2
    (small_disk / "filler").unlink()
    assert run(config).weights_sha256 == run(small(rounds=4)).weights_sha256


def test_a_disk_without_room_for_the_next_checkpoint(small_disk):
    """The log still has its page; the checkpoint does not fit any more."""
    config = logged(small_disk, rounds=4)

    def leave_two_pages() -> None:
        filler = fill(small_disk)
        os.truncate(filler, filler.stat().st_size - 2 * 4096)

    with pytest.raises(CheckpointNotWritten, match="No space left on device"):
        run(config, stop_in(3, leave_two_pages))
    end = log_of(small_disk, "end")[-1]
    assert end["status"] == "failed"
    assert "No space left on device" in end["error"]
    assert not list(cell(small_disk).glob(".*.part"))
    (small_disk / "filler").unlink()
    assert run(config).weights_sha256 == run(small(rounds=4)).weights_sha256


def test_a_failing_disk_without_mounting_anything(tmp_path, monkeypatch):
    config = logged(tmp_path, rounds=3)
    write = checkpoints.write_atomically

    def full(path: Path, content: bytes) -> None:
        if "000002" in path.name:
            raise OSError(28, "No space left on device")
        write(path, content)

    with monkeypatch.context() as disk:
        disk.setattr(checkpoints, "write_atomically", full)
        with pytest.raises(CheckpointNotWritten, match="No space left on device"):
            run(config)
    assert run(config).weights_sha256 == run(small(rounds=3)).weights_sha256


def test_a_read_only_folder(small_disk):
    run(logged(small_disk))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointNotWritten, match="Read-only file system"):
        run(logged(small_disk, checkpoint__cell="other"))
    with pytest.raises(LogNotWritten, match="Read-only file system"):
        run(logged(small_disk))


def test_tensors_stay_in_single_precision_whatever_the_strategy():
    for name in ("fedadam", "fedmedian"):
        outcome = run(small(strategy__name=name, normalizer__name="batch"))
        assert {value.dtype for value in outcome.tensors.values()} == {np.dtype(np.float32)}
        variances = [v for k, v in outcome.tensors.items() if k.endswith("running_var")]
        assert variances
        assert all((value >= 0).all() for value in variances)


# -- one writer -----------------------------------------------------------------------------------

SECOND = """
import sys
from tests.server.test_run import logged, run
from pathlib import Path
run(logged(Path(sys.argv[1])))
"""


def test_a_second_server_is_refused_and_writes_nothing(tmp_path):
    seen = []

    def tamper(number, partition, message, reply):
        if not seen:
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            done = subprocess.run(
                [sys.executable, "-c", SECOND, str(tmp_path)],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            assert before == after
            seen.append((done.returncode, done.stderr.splitlines()[-1]))
        return [reply]

    config = logged(tmp_path)
    run(config, tamper)
    ((code, said),) = seen
    assert code != 0
    assert f"is being run by another process (pid {os.getpid()} on " in said
    (end,) = log_of(tmp_path, "end")
    assert end["status"] == "completed"
    # And whoever comes after it may.
    run(config)
