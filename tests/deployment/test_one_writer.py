"""A run whose command was lost: nobody else writes its folder, and one can follow and stop it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from flwr.proto.control_pb2 import ListRunsRequest

from fedkn.config import ExperimentConfig
from server.deployment.bundle import build_bundle
from server.deployment.control import Control
from server.deployment.fleet import Fleet
from tests.deployment.fleets import SMALL, Run, a_fleet, bring_up, expected_weights, fedkn, wait_for


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    """Three devices on this machine, up."""
    with a_fleet(tmp_path_factory.mktemp("fleets") / "fleet") as made:
        bring_up(made)
        yield made


def test_a_run_outlives_its_command_and_has_one_writer(fleet):
    with Run(fleet, "lost", rounds=24) as run:
        run.after_round(1)
        run.hang_up()
    begun = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    again = fedkn("run", str(fleet.path), "--resume", "lost")
    assert again.returncode == 2, again.stderr
    said = " ".join(again.stderr.split())
    assert "fedkn deploy follow" in said
    assert "fedkn deploy stop" in said
    # Whoever asks the SuperLink itself gets a second ServerApp, and that is told who writes.
    config = ExperimentConfig.resolve(SMALL, begun["config"])
    with Control(fleet) as control:
        second = control.start(build_bundle(), config.flat())
        wait_for(lambda: control.run(second).finished)
        assert control.run(second).outcome == "failed"
        output = "\n".join(control.output(second))
    assert "is being run by another process (pid " in output
    assert f"fedkn deploy follow {fleet.path} lost" in output
    followed = fedkn("follow", str(fleet.path), "lost", timeout=600)
    assert followed.returncode == 0, followed.stderr
    assert "round 24/24: accuracy" in followed.stdout
    assert (run.folder / "report.html").is_file()
    (end,) = run.lines("end")
    assert end["weights_sha256"] == expected_weights(rounds=24)
    over = fedkn("follow", str(fleet.path), "lost")
    assert over.returncode == 2
    assert "is not being run" in over.stderr


def test_stop_ends_a_run_and_it_can_be_resumed(fleet):
    with Run(fleet, "stopped", rounds=6) as run:
        run.after_round(1)
        done = fedkn("stop", str(fleet.path), "stopped")
        assert done.returncode == 0, done.stderr
        assert "--resume stopped" in done.stdout
        code, output = run.end()
    assert code == 1
    assert "the run was stopped" in output
    again = fedkn("run", str(fleet.path), "--resume", "stopped")
    assert again.returncode == 0, again.stderr
    (end,) = run.lines("end")
    assert end["weights_sha256"] == expected_weights(rounds=6)


def test_devices_are_told_nothing_of_the_servers_folder(fleet):
    with Control(fleet) as control:
        runs = control._client.ListRuns(ListRunsRequest()).run_dict.values()
    assert runs
    for run in runs:
        sent = {key: str(value) for key, value in run.override_config.items()}
        assert "checkpoint.folder" not in sent
        assert str(fleet.path) not in repr(sent)
