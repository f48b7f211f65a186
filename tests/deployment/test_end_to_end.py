"""init, up, run, down with real processes: the simulation's weights; and what is refused."""

from __future__ import annotations

import json
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.supercore.control.control_http_client import ControlHttpClient

from server.deployment import programs
from server.deployment.certificates import create_authority, create_device_key, issue_certificate
from server.deployment.control import Control
from server.deployment.fleet import Fleet
from server.deployment.ports import free_port
from server.deployment.processes import running, start
from server.deployment.startup import bring_up, wait_for_devices
from tests.deployment.fleets import Run, a_fleet, expected_weights, fedkn, kill, refused


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    """Three devices on this machine, up."""
    with a_fleet(tmp_path_factory.mktemp("fleets") / "fleet") as made:
        done = fedkn("up", str(made.path), "--local")
        assert done.returncode == 0, done.stderr
        yield made


def test_a_run_ends_in_the_weights_of_the_simulation(fleet):
    started = time.monotonic()
    run = Run(fleet, "same")
    code, output = run.end()
    assert code == 0, output
    assert "round 3/3: accuracy" in output
    assert "training was NOT the larger part" in output
    assert time.monotonic() - started < 180
    assert run.lines("end")[0]["weights_sha256"] == expected_weights()
    assert (run.folder / "report.html").is_file()


def test_a_users_own_code_is_carried_to_devices_that_do_not_have_it(fleet, tmp_path, monkeypatch):
    (tmp_path / "carried_net.py").write_text(
        "from torch import nn\n"
        "from carried_parts import stem\n"
        "def net(num_classes, in_channels):\n"
        "    head = nn.Linear(4, num_classes)\n"
        "    return nn.Sequential(stem(in_channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), head)\n"
    )
    (tmp_path / "carried_parts.py").write_text(
        "from torch import nn\n"
        "def stem(channels):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4))\n"
    )
    own = {
        "model__name": "carried_net:net",
        "model__frozen": "0.0.*",
        "normalizer__name": "group",
        "model__width": 0,
        "rounds": 1,
    }
    code, output = Run(fleet, "own-code", tmp_path, **own).end()
    assert code == 0, output + (fleet.path / "logs" / "superexec.log").read_text()[-4000:]
    for name in ("carried_net.py", "carried_parts.py"):
        assert f"every device runs your {name} (1 file, 0." in output
    monkeypatch.syspath_prepend(str(tmp_path))
    run = fleet.runs / "own-code"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["weights_sha256"] == expected_weights(**own)


def test_a_superlink_killed_and_restarted_changes_nothing(fleet):
    run = Run(fleet, "superlink-killed")
    run.after_round(1)
    kill(fleet, "superlink")
    start(fleet, programs.superlink(fleet))
    code, output = run.end()
    assert code == 0, output
    assert run.lines("end")[0]["weights_sha256"] == expected_weights()


def test_a_run_that_fails_exits_with_1_and_says_why(fleet):
    run = Run(fleet, "fails", server__max_update_norm=1e-9, server__max_failed_rounds=1)
    code, output = run.end()
    assert code == 1, output
    assert "no valid update" in output
    assert "refused: client 0" in output


def test_no_key_and_no_datum_is_in_a_log(fleet):
    secrets = [line for device in fleet.devices for line in device.key.read_text().splitlines()]
    secrets = [line for line in secrets if line and "-----" not in line]
    for log in (fleet.path / "logs").iterdir():
        text = log.read_text(errors="replace")
        assert not [secret for secret in secrets if secret in text], log


def test_a_key_that_is_not_registered_is_refused(fleet, tmp_path):
    create_device_key(tmp_path / "own.key", tmp_path / "own.pub", "x")
    arguments = ["--superlink", fleet.superlink_address, "--root-certificates"]
    arguments += [str(fleet.authority), "--auth-supernode-private-key", str(tmp_path / "own.key")]
    told = "Failed to initialize the connection"
    assert told in refused(arguments, tmp_path, told)


def test_a_wrong_ca_is_refused(fleet, tmp_path):
    other = Fleet(tmp_path, 1, "localhost", 1, 2)
    (tmp_path / "ca").mkdir()
    create_authority(other)
    arguments = ["--superlink", fleet.superlink_address, "--root-certificates"]
    arguments += [str(other.authority), "--auth-supernode-private-key"]
    said = refused([*arguments, str(fleet.devices[0].key)], tmp_path, "certificate")
    assert "certificate" in said.lower(), said


def test_plain_text_with_a_key_is_refused_by_the_device_itself(fleet, tmp_path):
    arguments = ["--superlink", fleet.superlink_address, "--insecure"]
    arguments += ["--auth-supernode-private-key", str(fleet.devices[0].key)]
    told = "requires a secure TLS connection"
    assert told in refused(arguments, tmp_path, told)


def test_an_expired_certificate_is_refused(tmp_path):
    with a_fleet(tmp_path / "f", clients=1) as own:
        issue_certificate(own, timedelta(days=-2))
        start(own, programs.superlink(own))
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", own.superlink_port)):
                break
            time.sleep(0.2)
        arguments = ["--superlink", own.superlink_address, "--root-certificates"]
        arguments += [str(own.authority), "--auth-supernode-private-key"]
        said = refused([*arguments, str(own.devices[0].key)], tmp_path, "expired")
        assert "expired" in said, said


def test_missing_devices_are_named_within_a_minute(fleet):
    kill(fleet, "device-2", signal.SIGTERM)
    started = time.monotonic()
    assert "device-2" in fedkn("status", str(fleet.path)).stdout
    command, started = time.monotonic() - started, time.monotonic()
    done = fedkn("run", str(fleet.path), "--set", "rounds=1")
    assert done.returncode == 1
    assert "device-2" in done.stderr
    assert "device-1" not in done.stderr
    # On a machine with much to do any command takes long.
    assert time.monotonic() - started < 60 + 2 * command
    assert fedkn("up", str(fleet.path), "--local").returncode == 0


def test_holding_the_ca_does_not_open_control_through_the_proxy(tmp_path):
    if not Path("/usr/sbin/nginx").exists():
        pytest.skip("nginx is not installed: apt-get install nginx")
    with a_fleet(tmp_path / "f", clients=1) as own:
        bring_up(own, local=False, say=lambda text: None)
        start(own, programs.supernode(own, own.devices[0], own.address, free_port()))
        with Control(own) as control:
            wait_for_devices(control, 150, lambda text: None)
        context = ssl.create_default_context(cafile=str(own.authority))
        stranger = ControlHttpClient(f"https://{own.address}", verify=context)
        context = ssl.create_default_context(cafile=str(own.authority))
        context.load_cert_chain(own.devices[0].certificate)
        device = ControlHttpClient(f"https://{own.address}", verify=context)
        for outside, status in ((stranger, 400), (device, 403)):
            for call, request in (
                (outside.ListNodes, ListNodesRequest()),
                (outside.RegisterNode, RegisterNodeRequest(public_key=b"x")),
                (outside.StartRun, StartRunRequest()),
            ):
                with pytest.raises(httpx.HTTPStatusError) as refusal:
                    call(request)
                assert refusal.value.response.status_code == status
        others = ("runtime/acquire-task", "runtime/push-messages", "fleet/register-node")
        for path in (*(f"v1/{call}" for call in others), "health", "docs"):
            answer = httpx.post(f"https://{own.address}/{path}", verify=context)
            assert answer.status_code == 403, path
        # A node behind the proxy does not merely join: it trains.
        settings = ["--set", "rounds=1", "--set", "train.local_steps=2"]
        done = fedkn("run", str(own.path), *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        port = own.port
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=2)


def test_down_leaves_no_process_and_no_port(fleet):
    done = fedkn("down", str(fleet.path))
    assert done.returncode == 0
    assert "superlink" in done.stdout
    assert not running(fleet)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", fleet.superlink_port), timeout=2)
