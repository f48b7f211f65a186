"""A device behind a slow line, in a network namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from server.deployment import programs
from server.deployment.control import Control
from server.deployment.fleet import Fleet
from server.deployment.ports import free_port
from server.deployment.processes import start
from server.deployment.startup import bring_up, wait_for_devices
from tests.deployment.fleets import Run, a_fleet, expected_weights, losses

# Of a net that is set apart for trying networks (RFC 2544), so that it is nobody's.
HOST, DEVICE = "198.18.57.1", "198.18.57.2"
# A second, as many a telephone line has.
DOWN, UP = 1_000_000, 256_000


class Line:
    """A namespace that reaches this machine through a pair of virtual network cards."""

    def __init__(self, name: str) -> None:
        self.namespace = name
        self._here, self._there = f"{name}a", f"{name}b"

    def lay(self) -> None:
        """Make it, as fast as the machine."""
        inside = ("netns", "exec", self.namespace, "ip")
        ip("netns", "add", self.namespace)
        ip("link", "add", self._here, "type", "veth", "peer", "name", self._there)
        ip("link", "set", self._there, "netns", self.namespace)
        ip("address", "add", f"{HOST}/30", "dev", self._here)
        ip("link", "set", self._here, "up")
        ip(*inside, "address", "add", f"{DEVICE}/30", "dev", self._there)
        ip(*inside, "link", "set", self._there, "up")
        ip(*inside, "link", "set", "lo", "up")

    def slow_down(self, down: int, up: int) -> None:
        """Let pass so many bits a second, with up to half a second of them in the queue."""
        inside = ("ip", "netns", "exec", self.namespace)
        for where, card, bits in (((), self._here, down), (inside, self._there, up)):
            shape = ("tbf", "rate", f"{bits}bit", "burst", "16kb", "latency", "500ms")
            run([*where, "tc", "qdisc", "replace", "dev", card, "root", *shape])

    def remove(self) -> None:
        """Take it away."""
        subprocess.run(["ip", "link", "del", self._here], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True, check=False)


def ip(*words: str) -> None:
    run(["ip", *words])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(command[:4])} is not to be had here: {done.stderr.strip()}")


@contextmanager
def a_line() -> Iterator[Line]:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need root, ip and tc: apt-get install iproute2")
    line = Line(f"fkn{os.getpid()}")
    try:
        line.lay()
        line.slow_down(DOWN, UP)
        yield line
    finally:
        line.remove()


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    with a_line() as made:
        yield made


@pytest.fixture(scope="module")
def fleet(line, tmp_path_factory) -> Iterator[Fleet]:
    """Two devices, the second of them behind the line; both go through the proxy."""
    if not Path("/usr/sbin/nginx").exists():
        pytest.skip("nginx is not installed: apt-get install nginx")
    with a_fleet(tmp_path_factory.mktemp("fleets") / "fleet", 2, HOST) as made:
        bring_up(made, local=False, say=lambda text: None)
        near, far = (
            programs.supernode(made, device, made.address, free_port()) for device in made.devices
        )
        inside = ("ip", "netns", "exec", line.namespace)
        start(made, near)
        start(made, replace(far, command=(*inside, *far.command)))
        with Control(made) as control:
            wait_for_devices(control, 150, lambda text: None)
        yield made


def test_a_run_ends_with_all_updates_over_a_slow_line(fleet):
    experiment = {"rounds": 1, "cohort": 2, "model__width": 28}
    with Run(fleet, "slow", **experiment) as run:
        code, output = run.end()
    assert code == 0, output
    (line,) = run.lines("round")
    assert line["updates"] == 2, line
    # The line is slow indeed: longer than Flower waits for an answer.
    up = 8 * line["bytes_up"] / 2 / UP
    assert up > 30
    assert line["seconds"] > up + 8 * line["bytes_down"] / 2 / DOWN
    (end,) = run.lines("end")
    assert end["weights_sha256"] == expected_weights(partition__clients=2, **experiment)


def test_a_device_too_slow_for_the_deadline_is_named(fleet, line):
    settings = {"rounds": 2, "cohort": 2, "model__width": 8, "server__round_timeout": 40}
    with Run(fleet, "slower", **settings) as run:
        run.after_round(1)
        line.slow_down(16_000, 16_000)
        code, output = run.end()
    assert code == 0, output
    first, second = run.lines("round")
    assert first["updates"] == 2
    assert second["updates"] == 1
    assert losses(second) == {1: "no reply: node gone, or slower than server.round_timeout"}
    assert "failed: client 1: no reply: node gone, or slower than" in output
    assert "updates missing: client 1: round 2" in output
    assert second["seconds"] < 60
