"""What the trackers wrote, read back by the libraries themselves."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.fake_grid import run, small


def numbers(folder: Path) -> dict[str, dict[int, float]]:
    """Return by name and step what the trackers are to keep, read off the log by hand."""
    found: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "round":
            for name in ("train_loss", "learning_rate", "updates", "examples", "bytes_up"):
                found.setdefault(f"round/{name}", {})[line["round"]] = line[name]
            for name in ("refused", "failed"):
                found.setdefault(f"round/{name}", {})[line["round"]] = len(line[name])
        elif line["kind"] == "evaluation":
            for name, value in (line["metrics"] | {"loss": line["loss"]}).items():
                found.setdefault(f"{line['split']}/{name}", {})[line["round"]] = value
        elif line["kind"] == "client_evaluation":
            for name in ("mean", "worst_tenth", "deviation", "loss"):
                found.setdefault(f"clients/{name}", {})[line["round"]] = line[name]
    assert len(found["test/accuracy"]) == 4
    assert len(found["clients/mean"]) == 1
    return found


@pytest.fixture(scope="module")
def untracked() -> str:
    return run(small(rounds=3, evaluation__client_fraction=0.2)).weights_sha256


def tracked(tmp_path: Path, name: str, untracked: str, **options: str) -> Path:
    """Run with a tracker; return the run folder."""
    folder = tmp_path / "run"
    config = small(
        rounds=3,
        evaluation__client_fraction=0.2,
        observers__names=name,
        observers__options=json.dumps(options),
        checkpoint__folder=str(folder),
    )
    assert run(config).weights_sha256 == untracked
    kinds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["text"] for line in kinds if line["kind"] == "warning"] == []
    return folder


@pytest.mark.parametrize("elsewhere", [False, True])
def test_tensorboard(tmp_path: Path, untracked: str, elsewhere: bool) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"folder": str(tmp_path / "boards")} if elsewhere else {}
    folder = tracked(tmp_path, "tensorboard", untracked, **options)
    base = tmp_path / "boards" if elsewhere else folder / "tensorboard"
    assert (folder / "tensorboard").exists() is not elsewhere
    events = EventAccumulator(str(base / "experiment"))
    events.Reload()
    for name, by_step in numbers(folder).items():
        written = {event.step: event.value for event in events.Scalars(name)}
        assert written == pytest.approx(by_step, rel=1e-6)  # TensorBoard keeps float32
    settings = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "normalizer.name = 'group'" in settings
    status = events.Tensors("status/text_summary")[0].tensor_proto.string_val[0].decode()
    assert status == "completed"


def test_mlflow(tmp_path: Path, untracked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow.tracking import MlflowClient

    folder = tracked(tmp_path, "mlflow", untracked, experiment="digits")
    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("digits")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "experiment"
    assert found.data.params["normalizer.name"] == "group"
    for name, by_step in numbers(folder).items():
        history = client.get_metric_history(found.info.run_id, name)
        assert {metric.step: metric.value for metric in history} == by_step


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log of LevelDB's format, as Weights & Biases writes it.

    After seven bytes of its own: blocks of 32 KiB, of parts with checksum, length and type (1: a
    whole record; 2, 3, 4: its first, middle and last part).
    """
    assert content[:4] == b":W&B"
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_records(file: Path) -> list[Any]:
    """Return the records of a finished run, which its own service writes in its own time."""
    from wandb.proto import wandb_internal_pb2

    for _ in range(300):
        found = [wandb_internal_pb2.Record.FromString(data) for data in records(file.read_bytes())]
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError("Weights & Biases did not write the end of the run")


def test_weights_and_biases(tmp_path: Path, untracked: str) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")

    folder = tracked(tmp_path, "wandb", untracked)
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    written: dict[str, dict[int, float]] = {}
    config: dict[str, object] = {}
    for record in wandb_records(file):
        for update in record.run.config.update:
            config[update.key] = json.loads(update.value_json)
        items = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in items.items():
            if not name.startswith("_"):
                written.setdefault(name, {})[items["_step"]] = value
    expected = numbers(folder)
    assert {name: written[name] for name in expected} == expected
    assert config["normalizer.name"] == "group"


def test_a_number_that_is_none_is_left_out(tmp_path: Path) -> None:
    from fedkn.observer import Event
    from server.observers.tracker import Tracker

    kept: list[dict[str, float]] = []

    class Kept(Tracker):
        name = "kept"

        def open(self, folder, event):  # type: ignore[no-untyped-def]
            pass

        def record(self, step, numbers):  # type: ignore[no-untyped-def]
            kept.append(dict(numbers))

        def close(self, status):  # type: ignore[no-untyped-def]
            pass

    metrics = {"accuracy": 0.5, "f1": None}
    fields = {"round": 1, "split": "test", "loss": math.nan, "metrics": metrics}
    Kept().evaluation(Event("evaluation", "c", None, small(), fields))
    (numbers_,) = kept
    assert numbers_.keys() == {"test/accuracy", "test/loss"}
