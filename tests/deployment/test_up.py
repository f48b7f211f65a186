"""up, renew, logs and status with real processes: renewal, Ctrl-C, keys that do not fit."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from flwr.proto.control_pb2 import ListNodesRequest, UnregisterNodeRequest
from flwr.supercore.control.control_http_client import ControlHttpClient

from server.deployment.certificates import create_device_key, issue_certificate
from server.deployment.fleet import Fleet
from server.deployment.logs import last_lines
from server.deployment.processes import main_processes, stop
from tests.deployment.fleets import FEDKN, INTERRUPTIBLE, Run, a_fleet, bring_up, fedkn, wait_for


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[Fleet]:
    with a_fleet(tmp_path_factory.mktemp("fleets") / "fleet", clients=1) as new:
        yield new


@pytest.fixture
def fleet(made) -> Fleet:
    """One device on this machine, online."""
    bring_up(made)
    return made


def served(fleet: Fleet) -> bytes:
    """Return the certificate that the SuperLink shows."""
    return ssl.get_server_certificate(("127.0.0.1", fleet.superlink_port)).encode()


def background(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*INTERRUPTIBLE, str(FEDKN), "deploy", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_ctrl_c_of_up_leaves_what_runs_and_up_goes_on(made):
    stop(made)
    going = background("up", str(made.path), "--local")
    wait_for(lambda: made.devices[0].name in main_processes(made))
    going.send_signal(signal.SIGINT)
    said, errors = going.communicate(timeout=100)
    assert (going.returncode, errors) == (130, "")
    assert "stopped; what was started runs" in said
    before = main_processes(made)
    assert {"superlink", "superexec"} <= before.keys()
    done = fedkn("up", str(made.path), "--local")
    assert done.returncode == 0, done.stderr
    assert "device-0: online (1 of 1)" in done.stdout
    assert main_processes(made)["superlink"] == before["superlink"]


def test_a_renewal_does_not_end_a_run(fleet):
    old = served(fleet)
    with Run(fleet, "renewed", rounds=3, cohort=1) as run:
        run.after_round(1)
        done = fedkn("renew", str(fleet.path))
        assert done.returncode == 0, done.stderr
        code, output = run.end()
    assert code == 0, output
    assert not [line["failed"] for line in run.lines("round") if line["failed"]]
    assert served(fleet) == fleet.certificate.read_bytes() != old


def test_up_renews_a_certificate_in_its_last_days(fleet):
    issue_certificate(fleet, timedelta(days=5))
    assert "certificate ends in 4 days: fedkn deploy renew" in told(
        fedkn("status", str(fleet.path))
    )
    done = fedkn("up", str(fleet.path), "--local")
    assert done.returncode == 0, done.stderr
    assert "server certificate renewed: it ends on " in done.stdout
    assert served(fleet) == fleet.certificate.read_bytes()
    assert "certificate until 20" in told(fedkn("status", str(fleet.path)))


def told(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def test_without_the_authoritys_key_nothing_is_renewed(fleet, tmp_path):
    before = fleet.certificate.read_bytes()
    away = tmp_path / "ca.key"
    fleet.authority_key.rename(away)
    try:
        done = fedkn("renew", str(fleet.path))
    finally:
        away.rename(fleet.authority_key)
    assert done.returncode == 2
    assert "ca.key' is not here: bring it back" in done.stderr
    assert fleet.certificate.read_bytes() == before


def test_a_device_with_another_key_is_not_started(fleet, tmp_path):
    device = fleet.devices[0]
    stop(fleet, [device.name])
    own = device.key.read_bytes()
    create_device_key(device.key, tmp_path / "other.pub", "x")
    started = time.monotonic()
    try:
        done = fedkn("up", str(fleet.path), "--local")
    finally:
        device.key.write_bytes(own)
    assert done.returncode == 2
    assert "device.key' is not the key that the server knows" in done.stderr
    assert time.monotonic() - started < 30


def test_a_device_whose_key_was_unregistered_comes_back_with_a_new_one(fleet):
    stop(fleet, [fleet.devices[0].name])
    control = ControlHttpClient.from_server_address(
        fleet.superlink_address, False, fleet.authority.read_bytes(), interceptors=[]
    )
    (node,) = control.ListNodes(ListNodesRequest()).nodes_info
    control.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
    assert "device-0 unregistered" in told(fedkn("status", str(fleet.path)))
    refused = fedkn("up", str(fleet.path), "--local")
    assert refused.returncode == 2
    remedy = refused.stderr.partition("new one: ")[2]
    assert remedy.startswith("rm ")
    subprocess.run(remedy, shell=True, check=True)
    done = fedkn("up", str(fleet.path), "--local")
    assert done.returncode == 0, done.stderr
    assert "device-0: key registered" in done.stdout


def test_logs_of_all_of_one_and_of_none(fleet):
    everything = fedkn("logs", str(fleet.path))
    assert everything.returncode == 0
    names = {line.split()[0] for line in everything.stdout.splitlines()}
    assert {"superlink", "superexec", "device-0"} <= names
    one = fedkn("logs", str(fleet.path), "--process", "device-0", "--lines", "2")
    assert [line.split()[0] for line in one.stdout.splitlines()] == ["device-0"] * 2
    assert "\x1b" not in everything.stdout
    none = fedkn("logs", str(fleet.path), "--process", "device-O")
    assert none.returncode == 2
    assert "device-0" in none.stderr


def test_no_last_lines_of_logs(fleet):
    assert not last_lines(fleet, "device-0", 0)
    assert len(last_lines(fleet, "device-0", 3)) == 3


def test_followed_logs_go_on_until_ctrl_c(fleet):
    options = ["--process", "device-0", "--follow", "--lines", "1"]
    following = background("logs", str(fleet.path), *options)
    assert following.stdout is not None
    try:
        assert following.stdout.readline().startswith("device-0  ")
        time.sleep(1)
        with fleet.log("device-0").open("a") as log:
            log.write("something new\n")
        while "something new" not in following.stdout.readline():
            pass
        following.send_signal(signal.SIGINT)
        _, errors = following.communicate(timeout=100)
    finally:
        following.kill()
    assert (following.returncode, errors) == (130, "")
