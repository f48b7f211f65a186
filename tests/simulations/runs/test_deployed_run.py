"""What is said at the end of a deployed run: of what it failed, and who missed which rounds."""

from __future__ import annotations

from typing import Any

import pytest

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError
from server.deployment.certificates import create_device_key
from server.deployment.control import RunState
from server.deployment.fleet import Fleet
from simulations.commands.deploy_run import missing_updates
from simulations.runs import deployed_run
from simulations.runs.deployed_run import Progress, run_deployed

# As the SuperLink gives back what a ServerApp printed whose disk was full.
OUTPUT = """\
\x1b[92mINFO \x1b[0m:      round 2/3: 3 of 3 updates, 16.8 s
Traceback (most recent call last):
  File "/apps/fedkn/server/checkpoints.py", line 149, in _write
    raise CheckpointNotWritten(
server.checkpoints.CheckpointNotWritten: cannot write c.safetensors (No space left on device): free
\x1b[91mERROR \x1b[0m:     Exit Code: 201

An unhandled exception occurred in the ServerApp.

For more information, visit: <https://flower.ai/docs/framework/1.41/en/ref-exit-codes/201.html>
"""


class Failed:
    """A Control API whose run has failed, and printed `output`."""

    def __init__(self, output: str) -> None:
        self._output = output

    def start(self, bundle: bytes, config: Any) -> int:
        return 1

    def run(self, run_id: int) -> RunState:
        return RunState(run_id, "finished", "failed", "exit code 201", "", "", "", "")

    def output(self, run_id: int) -> list[str]:
        return self._output.splitlines()


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (OUTPUT, "cannot write c.safetensors (No space left on device): free"),
        (
            "round 2/3\n",
            "its process on the server was killed or crashed (exit code 201), the last that it "
            "printed: round 2/3",
        ),
        ("", "its process on the server was killed or crashed (exit code 201)"),
    ],
)
def test_the_reason_is_told_without_a_log(output, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(deployed_run, "build_bundle", lambda own: b"")
    fleet = Fleet(tmp_path, 1, "localhost", 1, 2)
    (device,) = fleet.devices
    (tmp_path / "run").mkdir()
    fleet.public_key(device).parent.mkdir()
    create_device_key(tmp_path / "device.key", fleet.public_key(device), device.name)
    config = ExperimentConfig().overlay(checkpoint__folder=str(tmp_path / "run"))
    with pytest.raises(FedknError) as failure:
        run_deployed(fleet, config, Failed(output), print)
    assert str(failure.value) == f"the run failed after 0 rounds: {reason}"


class Orphaned(Failed):
    """A Control API that takes a run for running until it is stopped: its SuperExec is gone."""

    def __init__(self) -> None:
        super().__init__("")
        self.stopped: list[int] = []

    def run(self, run_id: int) -> RunState:
        return RunState(run_id, "running", "", "", "", "", "", "")

    def stop(self, run_id: int) -> None:
        self.stopped.append(run_id)


def test_a_run_whose_superexec_is_gone_is_ended_so_that_it_can_be_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(deployed_run, "build_bundle", lambda own: b"")
    monkeypatch.setattr(deployed_run, "main_processes", lambda fleet: {"superlink": None})
    fleet = Fleet(tmp_path, 0, "localhost", 1, 2)
    config = ExperimentConfig().overlay(checkpoint__folder=str(tmp_path))
    control = Orphaned()
    with pytest.raises(FedknError, match="the SuperExec, which runs the server's part"):
        run_deployed(fleet, config, control, print)
    assert control.stopped == [1]


def test_who_missed_which_rounds():
    progress = Progress()
    losses = {2: [1], 3: [1, 0], 4: [1], 6: [1, None]}
    for number in range(1, 8):
        failed = [{"client": client, "reason": "no reply"} for client in losses.get(number, [])]
        line = {"kind": "round", "round": number, "seconds": 1.0, "train_seconds": 1.0}
        progress.take({**line, "updates": 1, "failed": failed, "refused": failed})
    told = "updates missing: client 0: round 3; client 1: rounds 2-4, 6"
    assert missing_updates(progress) == told
