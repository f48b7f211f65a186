"""A device whose own images change while a run is under way."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from clients.local_state import STATE_FOLDER
from fedkn.data import sources
from server.run import run_server
from simulations.report.holdings import client_tables
from simulations.report.losses import losses
from simulations.runs.flower_runs import open_run
from tests.forgotten import forget_data
from tests.server.fake_grid import FakeGrid, small

DIGITS = sources.load("digits").train


def save(path: Path, part: slice, change: int = 0) -> Path:
    labels = DIGITS.targets[part].numpy().copy()
    labels[:change] = (labels[:change] + 1) % 10
    np.savez(
        path, images=DIGITS.inputs[part].numpy(), labels=labels, classes=np.array(DIGITS.classes)
    )
    return path


class Devices(FakeGrid):
    """Two devices with images of their own; the second has a state folder.

    They read their images anew for every message, as devices do. `before`: called with the round
    before a training message is delivered.
    """

    def __init__(self, config, folder, before=lambda _: None):
        super().__init__(config)
        self._before = before
        for number, context in enumerate(self._contexts.values()):
            context.node_config["data-path"] = str(folder / f"{number}.npz")
            if number:
                context.node_config[STATE_FOLDER] = str(folder / "state")

    def _deliver(self, message):
        if message.metadata.message_type == "train":
            self._before(message.content.config_records["config"]["server-round"])
        forget_data()
        return super()._deliver(message)


@pytest.fixture
def config(tmp_path):
    save(tmp_path / "0.npz", slice(0, 100))
    save(tmp_path / "1.npz", slice(100, 234))
    return small(checkpoint__folder=str(tmp_path / "run"), partition__clients=2, cohort=2, rounds=4)


def rounds(folder: Path):
    (cell,) = open_run(folder / "run").cells()
    return [entry.data_changed for entry in cell.rounds]


def test_a_device_says_from_when_on_its_data_are_others(tmp_path, config, caplog):
    def change(round_):
        if round_ == 3:
            save(tmp_path / "1.npz", slice(100, 234), change=5)

    with caplog.at_level(logging.WARNING, logger="flwr"):
        run_server(Devices(config, tmp_path, change), config)
    assert rounds(tmp_path) == [(), (), (1,), (1,)]
    assert "this device's data changed since its first round of this run: labels" in caplog.text
    assert "round 3: client 1: its own data changed" in caplog.text
    (line,) = losses(open_run(tmp_path / "run").cells(), 0)
    assert line.what == "clients whose data changed"
    assert line.amount == "2 updates (client 1)"


def test_a_device_that_joins_again_knows_its_first_data(tmp_path, config):
    """In a resumed run, where all that the device has is its state folder."""
    run_server(Devices(config, tmp_path), config.overlay(rounds=4))
    assert rounds(tmp_path) == [()] * 4
    (kept,) = (tmp_path / "state").rglob("data")
    assert kept.parent.parent.name == "client-1"
    for checkpoint in sorted((tmp_path / "run" / "cells" / "experiment").glob("*.safetensors"))[1:]:
        checkpoint.unlink()
    save(tmp_path / "1.npz", slice(100, 233))
    run_server(Devices(config, tmp_path), config)
    assert rounds(tmp_path)[-1] == (1,)


def test_what_a_fleets_report_draws_is_what_its_devices_hold(tmp_path, config):
    run_server(Devices(config, tmp_path), config)
    run = open_run(tmp_path / "run")
    (table,) = client_tables(run, run.grid.partitions[0], run.cells())
    assert table.reported
    assert table.silent == ()
    assert table.record.classes == list("0123456789")
    for row, part in zip(table.record.counts, (slice(0, 100), slice(100, 234)), strict=True):
        assert row == np.bincount(DIGITS.targets[part], minlength=10).tolist()


def test_a_device_that_never_joined_is_named_as_unknown(tmp_path, config):
    run_server(Devices(config, tmp_path), config)
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text().replace('{"client": 1, "examples"', '{"client": 7, "examples"'))
    run = open_run(tmp_path / "run")
    (table,) = client_tables(run, run.grid.partitions[0], run.cells())
    assert table.silent == (1,)
    assert table.silent_clients == "client 1"
    assert sum(table.record.counts[1]) == 0
