"""Fleets of real processes for the tests: made in a temporary folder, gone when the test ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from fedkn.config import ExperimentConfig
from server.deployment.creation import create_fleet
from server.deployment.fleet import Fleet
from server.deployment.ports import free_port
from server.deployment.processes import main_processes, running, stop
from server.deployment.programs import flower_environment
from simulations.engines.run import run_experiment

# What a shell starts in the background ignores Ctrl-C, what nohup starts a lost terminal, and both
# hand that on.
INTERRUPTIBLE = ("env", "--default-signal=INT,HUP")
SUPERNODE = (sys.executable, "-P", "-m", "clients.device.supernode")
FEDKN = Path(sys.executable).parent / "fedkn"
SMALL = {
    "rounds": 3,
    "train.local_steps": 10,
    "model.width": 4,
    "device": "cpu",
    "partition.clients": 3,
    "cohort": 3,
}


def on_path(folder: Path) -> str:
    """Return a PYTHONPATH that begins with `folder`."""
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


@contextmanager
def a_fleet(path: Path, clients: int = 3, host: str = "localhost") -> Iterator[Fleet]:
    """Yield a fleet folder; on leaving, no process of it is left."""
    fleet = create_fleet(path, clients, host, two_free_ports())
    try:
        yield fleet
    finally:
        stop(fleet)
        assert not running(fleet)


def two_free_ports() -> int:
    """Return a port such that it and the next are free."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue


def fedkn(*arguments: str, timeout: float = 200.0) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run(
        [str(FEDKN), "deploy", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


class Run:
    """`fedkn deploy run` in the background: meanwhile something is done to the fleet.

    In a ``with`` it is gone at the end, also where the test fails. `folder`: where it is started.
    """

    def __init__(
        self, fleet: Fleet, name: str, /, folder: Path | None = None, **changes: Any
    ) -> None:
        settings = {key: value for key, value in SMALL.items() if key != "partition.clients"}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        arguments = [f"--set={key}={value}" for key, value in settings.items()]
        self.folder = fleet.runs / name
        self._process = subprocess.Popen(
            [
                *INTERRUPTIBLE,
                str(FEDKN),
                "deploy",
                "run",
                str(fleet.path),
                "--name",
                name,
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=folder,
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def going(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def hang_up(self) -> None:
        """Lose the terminal, as with an SSH connection."""
        self._process.send_signal(signal.SIGHUP)
        self._process.communicate(timeout=30)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl of one kind."""
        try:
            text = (self.folder / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [line for line in found if line["kind"] == kind]

    def after_round(self, number: int, timeout: float = 150.0) -> None:
        """Wait until round `number` has ended."""
        wait_for(lambda: len(self.lines("round")) >= number, timeout)

    def end(self, timeout: float = 600.0) -> tuple[int, str]:
        """Wait for the end; return exit code and output."""
        try:
            output, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        return self._process.returncode, output


def bring_up(fleet: Fleet) -> None:
    """Start on this machine what does not run, and wait until all devices are online."""
    done = fedkn("up", str(fleet.path), "--local", timeout=300)
    assert done.returncode == 0, done.stderr


def wait_for(condition: Callable[[], object], timeout: float = 200.0) -> None:
    """Wait until `condition` holds, for as long as a machine with much to do may need."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def kill(fleet: Fleet, name: str, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a program of the fleet and to all that it started."""
    for process in running(fleet):
        if process.name == name:
            psutil.Process(process.pid).send_signal(number)
    if number is signal.SIGKILL:
        wait_for(lambda: name not in main_processes(fleet))


def expected_weights(**changes: object) -> str:
    """Return the weights of the simulation of the same experiment."""
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    config = ExperimentConfig.resolve(SMALL, keys, {"engine": "inprocess", "workers": 1})
    return run_experiment(config).weights_sha256


def losses(line: dict[str, Any], kind: str = "failed") -> dict[int, str]:
    """Return by client why its update is not in a round."""
    return {loss["client"]: loss["reason"] for loss in line[kind]}


def training(fleet: Fleet, name: str) -> bool:
    """Whether a ClientApp of the device runs, beside its SuperNode and SuperExec."""
    found = (one.pid for one in running(fleet) if one.name == name)
    # Forked ones have no command line of their own.
    return any(Path(f"/proc/{pid}/comm").read_text() == "flwr-clientapp\n" for pid in found)


def refused(
    arguments: list[str], folder: Path, told: str, environment: Mapping[str, str] | None = None
) -> str:
    """Start a SuperNode that is to be refused and to say `told`; return what it said.

    It is ended once it has said so, or after three minutes, which is for machines with much to do.
    """
    # A file: the SuperExec that it starts keeps a pipe open after it has ended.
    log = folder / "supernode.log"
    with log.open("w") as output:
        process = psutil.Popen(
            [*SUPERNODE, *arguments, "--port", str(free_port())],
            env={**flower_environment(folder), **(environment or {})},
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 180
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if told.lower() in _flat(log).lower():
                break
            with suppress(psutil.Error):
                children = process.children(recursive=True)
            time.sleep(0.1)
    finally:
        for one in (*children, process):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
    return _flat(log)


def _flat(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())
