"""Runs that are resumed, or begun beside others, on data that are not those of before."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, MessageType, RecordDict

from clients.app import app
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import data_summary, federated_data
from fedkn.federation import data_record
from server.checkpoints import CheckpointStore
from server.run import run_server
from server.run_data import DataChanged
from tests.forgotten import forget_data
from tests.server.fake_grid import FakeGrid, run, small

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (90, 8, 8), dtype=np.uint8)
LABELS = np.arange(90) % 3


@pytest.fixture(autouse=True)
def _new_process():
    forget_data()
    yield
    forget_data()


def write(path: Path, labels: np.ndarray = LABELS, images: np.ndarray = IMAGES) -> None:
    np.savez(path / "a.npz", images=images, labels=labels)
    forget_data()


def configured(path: Path, cell: str = "one", **changes) -> ExperimentConfig:
    return small(
        data__source="arrays",
        data__root=str(path / "a.npz"),
        checkpoint__folder=str(path / "run"),
        checkpoint__cell=cell,
        rounds=4,
        **changes,
    )


def lines(path: Path, kind: str) -> list[dict]:
    log = (path / "run" / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, log) if line["kind"] == kind]


class Stopped(Exception):
    """Stands for a kill."""


def stop_in(round_: int):
    def tamper(number: int, partition: int, message: Message, reply: Message) -> list[Message]:
        if number == round_:
            raise Stopped
        return [reply]

    return tamper


def begun(path: Path) -> ExperimentConfig:
    """Run two of four rounds; return the configuration."""
    config = configured(path)
    with pytest.raises(Stopped):
        run(config, stop_in(3))
    assert len(lines(path, "round")) == 2
    return config


def test_a_cell_goes_on_with_the_same_data_alone(tmp_path):
    write(tmp_path)
    expected = run(configured(tmp_path).overlay(checkpoint__folder="")).weights_sha256
    config = begun(tmp_path)
    write(tmp_path, labels=(LABELS + 1) % 3)
    with pytest.raises(DataChanged, match=r"the data changed since .*: labels"):
        run(config)
    (end,) = lines(tmp_path, "end")
    assert end["status"] == "failed"
    assert "the data changed" in end["error"]
    assert len(lines(tmp_path, "round")) == 2
    write(tmp_path)
    assert run(config).weights_sha256 == expected


def test_the_checkpoint_alone_is_enough_to_notice(tmp_path):
    """As under flwr run with a folder from which only the cell's was copied."""
    write(tmp_path)
    config = begun(tmp_path)
    (tmp_path / "run" / "data.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    pixel = IMAGES.copy()
    pixel[5, 0, 0] ^= 128
    write(tmp_path, images=pixel)
    with pytest.raises(DataChanged, match=r"cells/one' was begun: .* images"):
        run(config)


def test_a_new_cell_trains_on_the_data_of_the_finished_ones(tmp_path):
    write(tmp_path)
    run(configured(tmp_path))
    order = np.random.default_rng(0).permutation(90)
    write(tmp_path, LABELS[order], IMAGES[order])
    with pytest.raises(DataChanged, match="order of the images"):
        run(configured(tmp_path, "two", seed=1))
    assert [line["cell"] for line in lines(tmp_path, "round")] == ["one"] * 4
    write(tmp_path)
    run(configured(tmp_path, "two", seed=1))


def test_a_run_of_an_earlier_fedkn_goes_on_and_says_that_it_cannot_tell(
    tmp_path, caplog, monkeypatch
):
    write(tmp_path)
    real = CheckpointStore.save
    with monkeypatch.context() as earlier:
        earlier.setattr(
            CheckpointStore,
            "save",
            lambda self, made: real(self, type(made)(*(getattr(made, n) for n in _OLD_FIELDS))),
        )
        config = begun(tmp_path)
    (tmp_path / "run" / "data.json").unlink()
    write(tmp_path, labels=(LABELS + 1) % 3)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        run(config)
    said = [r.getMessage() for r in caplog.records if "says nothing of its data" in r.getMessage()]
    assert len(said) == 2
    assert "checkpoint-000002" in said[1]
    # From here on it knows.
    write(tmp_path)
    with pytest.raises(DataChanged):
        run(configured(tmp_path, "two"))


_OLD_FIELDS = ("round_", "tensors", "strategy", "participation")


class Copies(FakeGrid):
    """Clients with a copy of the data of their own, which may be another."""

    def __init__(self, config: ExperimentConfig, root: Path) -> None:
        super().__init__(config)
        for context in self._contexts.values():
            context.run_config["data.root"] = str(root)


def test_a_client_whose_copy_of_the_data_is_another_is_refused(tmp_path):
    write(tmp_path)
    config = configured(tmp_path, partition__clients=3, server__join_timeout=0.1)
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    write(tmp_path / "same")
    write(tmp_path / "other", labels=LABELS[::-1].copy())
    forget_data()
    assert run_server(Copies(config, tmp_path / "same" / "a.npz"), config).rounds == 4
    forget_data()
    again = config.overlay(checkpoint__folder="")
    with pytest.raises(UserError, match=r"other data here than the server's.*: labels"):
        _ask(Copies(again, tmp_path / "other" / "a.npz"), again)


def _ask(grid: FakeGrid, config: ExperimentConfig) -> None:
    content = RecordDict({"data": data_record(data_summary(config))})
    message = Message(content, dst_node_id=500, message_type=MessageType.QUERY)
    app(message, grid._contexts[500])


# -- what clients hold ----------------------------------------------------------------------------


def test_what_clients_said_on_joining_is_in_the_log(tmp_path):
    write(tmp_path)
    config = configured(tmp_path)
    run(config)
    data = federated_data(config)
    (line,) = lines(tmp_path, "joined")
    assert line["round"] == 0
    for number, held in enumerate(line["clients"]):
        labels = data.train.targets[data.parts[number]].tolist()
        counts = {str(label): labels.count(label) for label in set(labels)}
        assert held == {"client": number, "examples": len(labels), "labels": counts}
    assert len(line["clients"]) == 6


@pytest.mark.parametrize("mechanism", ["example", "client_fixed"])
def test_under_differential_privacy_labels_are_not_told(tmp_path, mechanism):
    write(tmp_path)
    private = {"privacy.mechanism": mechanism, "privacy.noise_multiplier": 1.0}
    config = configured(tmp_path, evaluation__client_fraction=0.0).overlay(
        **{key.replace(".", "__"): value for key, value in private.items()}
    )
    run(config)
    (line,) = lines(tmp_path, "joined")
    assert [held["labels"] for held in line["clients"]] == [None] * 6
