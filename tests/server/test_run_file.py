"""What a deployed run's server is told, and no device."""

from __future__ import annotations

import stat
import threading
import time

import pytest

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError, UserError
from server import run_file
from server.run_file import (
    RUN_FILES,
    RunFile,
    for_clients,
    read_run_file,
    told_run,
    write_run_file,
)


def config() -> ExperimentConfig:
    return ExperimentConfig().overlay(
        checkpoint__folder="/srv/fleet/runs/a", server__max_update_norm=3.0, strategy__trim=0.1
    )


def test_the_server_is_told_all_and_devices_are_not(tmp_path, monkeypatch):
    write_run_file(tmp_path / "runs", 7, RunFile(config(), "ask Ada"))
    assert stat.S_IMODE((tmp_path / "runs" / "7.json").stat().st_mode) == 0o600
    monkeypatch.setenv(RUN_FILES, str(tmp_path / "runs"))
    sent = for_clients(config())
    assert told_run(7, sent) == RunFile(config(), "ask Ada")
    assert not [
        key for key in sent if key.startswith("server.m") and key != "server.max_failed_rounds"
    ]
    assert not {"checkpoint.folder", "strategy.trim", "workers"} & sent.keys()
    assert "/srv" not in repr(sent)


def test_what_devices_are_sent_is_a_configuration_that_trains_the_same():
    own = config().overlay(
        strategy__name="scaffold", train__batch_size=4, privacy__noise_multiplier=2.0, seed=5
    )
    there = ExperimentConfig.resolve(for_clients(own))
    for section in ("data", "partition", "model", "normalizer", "train", "privacy"):
        assert getattr(there, section) == getattr(own, section)
    assert (there.seed, there.rounds, there.cohort) == (own.seed, own.rounds, own.cohort)
    assert there.strategy.name == "scaffold"
    assert there.checkpoint.keep == own.checkpoint.keep
    assert there.server.max_failed_rounds == own.server.max_failed_rounds
    assert there.evaluation.client_fraction == own.evaluation.client_fraction


def test_without_a_fleet_the_run_config_is_all_there_is(monkeypatch):
    monkeypatch.delenv(RUN_FILES, raising=False)
    assert told_run(7, {"seed": 3}).config.seed == 3


def test_the_file_of_a_run_that_began_at_once_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv(RUN_FILES, str(tmp_path))

    def write() -> None:
        time.sleep(0.5)
        write_run_file(tmp_path, 7, RunFile(config(), ""))

    thread = threading.Thread(target=write)
    thread.start()
    assert told_run(7, {}).config == config()
    thread.join()


def test_a_run_that_is_none_of_the_fleets_ends(tmp_path, monkeypatch):
    monkeypatch.setenv(RUN_FILES, str(tmp_path))
    monkeypatch.setattr(run_file, "_WAIT_SECONDS", 0.2)
    with pytest.raises(FedknError, match="start runs by fedkn deploy run"):
        told_run(8, {})


@pytest.mark.parametrize("content", ["", "[]", '{"config": 3}', '{"config": {"sed": 1}}', "\x00"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "7.json").write_text(content)
    with pytest.raises(UserError, match=r"7\.json"):
        read_run_file(tmp_path, 7)
