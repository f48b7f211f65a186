"""Who is refused, and what both sides read: clocks, replayed headers, keys, plain text, size."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from clients.device.supernode import client_with
from server.deployment import programs
from server.deployment.certificates import create_authority, issue_certificate
from server.deployment.control import Control
from server.deployment.fleet import Device, Fleet
from server.deployment.logs import last_lines
from server.deployment.ports import free_port
from server.deployment.processes import start, stop
from server.deployment.proxy import REFUSALS
from server.deployment.startup import bring_up, wait_for_devices
from tests.deployment.fleets import FEDKN, Run, a_fleet, losses, on_path, refused, wait_for
from tests.deployment.hostile import become_hostile

NGINX = "/usr/sbin/nginx"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    """A server behind its proxy, and two devices that are not started."""
    if not Path(NGINX).exists():
        pytest.skip("nginx is not installed: apt-get install nginx")
    with a_fleet(tmp_path_factory.mktemp("fleets") / "fleet", clients=2) as made:
        bring_up(made, local=False, say=lambda text: None)
        yield made


@pytest.fixture(scope="module")
def online(fleet) -> Device:
    """The first device, started and online."""
    device = fleet.devices[0]
    start(fleet, programs.supernode(fleet, device, fleet.address, free_port()))
    wait_for(lambda: "SuperNode ID:" in said(fleet, device.name))
    return device


def said(fleet: Fleet, name: str) -> str:
    """Return what a program of the fleet, or `refusals`, has in its log."""
    return "\n".join(last_lines(fleet, name, 10_000))


@contextmanager
def logged(fleet: Fleet, *reasons: str) -> Iterator[list[str]]:
    """Check that what is done meanwhile adds a line with `reasons` to the refusals; yield it."""
    before = said(fleet, REFUSALS).splitlines()
    line: list[str] = []
    yield line
    # nginx answers first, and then writes.
    wait_for(lambda: len(said(fleet, REFUSALS).splitlines()) > len(before))
    line.append(said(fleet, REFUSALS).splitlines()[-1])
    for reason in reasons:
        assert reason in line[0]


def arguments(fleet: Fleet, device: Device) -> list[str]:
    return [
        *("--superlink", fleet.address, "--root-certificates", str(fleet.authority)),
        *("--auth-supernode-private-key", str(device.key)),
        *("--certificate", str(device.certificate)),
    ]


SHIFTED = """
import datetime
import time

SECONDS = {seconds}
honest = time.time
time.time = lambda: honest() + SECONDS


class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=SECONDS)


datetime.datetime = Shifted
"""


@pytest.mark.parametrize(("seconds", "told"), [(60, "ahead of"), (-600, "behind")])
def test_a_device_whose_clock_is_off_is_told_so_and_refused(fleet, tmp_path, seconds, told):
    (tmp_path / "sitecustomize.py").write_text(SHIFTED.format(seconds=seconds))
    off = {"PYTHONPATH": on_path(tmp_path)}
    device = fleet.devices[1]

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(FEDKN), "device", *words],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", **off},
        )

    (tmp_path / "small.toml").write_text("[model]\nwidth = 4\n")
    checked = command(
        "check", str(device.folder), "--json", "--config", str(tmp_path / "small.toml")
    )
    findings = {one["name"]: one for one in json.loads(checked.stdout)["findings"]}
    assert checked.returncode == 1
    assert [name for name, one in findings.items() if one["status"] == "fail"] == ["clock"]
    assert abs(int(findings["clock"]["message"].split()[0]) - abs(seconds)) <= 3
    assert f"{told} the server's" in findings["clock"]["message"]
    assert "set the clock" in findings["clock"]["fix"]

    started = command("start", str(device.folder))
    assert started.returncode == 1
    assert f"{told} the server's: set the clock" in " ".join(started.stderr.split())

    # Flower's own program, started nevertheless, ends without a reason; the server has one.
    reasons = ("/v1/fleet/activate-node: 401, signed at 20", "over 5 s ahead or 305 s behind")
    with logged(fleet, *reasons) as line:
        told = "SuperNode terminated"
        assert told in refused(arguments(fleet, device), tmp_path, told, off)
    signed = datetime.fromisoformat(re.search(r"signed at ([^ ,]+)", line[0])[1])
    assert abs((signed - datetime.now(UTC)).total_seconds() - seconds) < 20


def test_a_certificate_that_a_device_does_not_believe_is_told_on_both_sides(fleet, tmp_path):
    other = Fleet(tmp_path, 1, "localhost", 1, 2)
    (tmp_path / "ca").mkdir()
    create_authority(other)
    words = arguments(fleet, fleet.devices[0])
    words[words.index(str(fleet.authority))] = str(other.authority)
    told = "certificate verify failed: unable to get local issuer"
    assert told in refused(words, tmp_path, told)
    assert "alert unknown ca" in said(fleet, programs.PROXY)
    try:
        issue_certificate(fleet, timedelta(days=-2))
        restart_proxy(fleet)
        told = "certificate verify failed: certificate has expired"
        assert told in refused(arguments(fleet, fleet.devices[0]), tmp_path, told)
        assert "alert certificate expired" in said(fleet, programs.PROXY)
    finally:
        issue_certificate(fleet)
        restart_proxy(fleet)


def restart_proxy(fleet: Fleet) -> None:
    stop(fleet, [programs.PROXY])
    start(fleet, programs.proxy(fleet, NGINX))
    host, port = fleet.address.split(":")
    wait_for(lambda: not socket.socket().connect_ex((host, int(port))))


def test_a_copied_key_is_refused_while_its_device_is_online(fleet, online, tmp_path):
    with logged(fleet, "/v1/fleet/activate-node: 412, key not registered, or online already"):
        told = "Failed to activate SuperNode"
        assert told in refused(arguments(fleet, online), tmp_path, told)
    assert "could not be activated" in said(fleet, "superlink")


class Call(NamedTuple):
    """A call of a SuperNode as whoever reads inside TLS sees it."""

    path: str
    headers: dict[str, str]
    body: bytes


@contextmanager
def eavesdropper(fleet: Fleet) -> Iterator[tuple[str, list[Call]]]:
    """Stand before the SuperLink with its own certificate; yield the address and what passes."""
    calls: list[Call] = []
    trust = ssl.create_default_context(cafile=str(fleet.authority))

    class Forward(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {key.lower(): value for key, value in self.headers.items()}
            calls.append(Call(self.path, headers, body))
            answer = httpx.post(
                f"https://{fleet.superlink_address}{self.path}",
                content=body,
                headers={**headers, "accept-encoding": "identity"},
                verify=trust,
            )
            self.send_response_only(answer.status_code)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, *args: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Forward)
    server.daemon_threads = True
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(fleet.certificate, fleet.certificate_key)
    server.socket = own.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", calls
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def post(fleet: Fleet, call: Call) -> httpx.Response:
    """Send a call to the proxy, from somewhere else than the device."""
    left_out = ("host", "content-length")
    headers = {key: value for key, value in call.headers.items() if key not in left_out}
    trust = ssl.create_default_context(cafile=str(fleet.authority))
    trust.load_cert_chain(fleet.devices[1].certificate)
    return httpx.post(
        f"https://{fleet.address}{call.path}", content=call.body, headers=headers, verify=trust
    )


def signing(fleet: Fleet, device: Device) -> tuple[FleetHttpClient, bytes]:
    """Return a client that signs as the SuperNode of `device` does, and the device's public key."""
    key = load_ssh_private_key(device.key.read_bytes(), password=None)
    client = client_with(device.certificate).from_server_address(
        fleet.address,
        False,
        fleet.authority.read_bytes(),
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    )
    return client, public_key_to_bytes(key.public_key())


def test_captured_headers_are_good_for_their_own_device_alone(fleet):
    device = fleet.devices[1]
    with eavesdropper(fleet) as (address, calls):
        start(fleet, programs.supernode(fleet, device, address, free_port()))
        wait_for(lambda: [call for call in calls if call.path.endswith("pull-messages")])
        captured = next(call for call in calls if call.path.endswith("pull-messages"))
        # The signature is over the time alone. Whoever has it can say it again, and other things.
        assert post(fleet, captured).status_code == 200
        node = PullMessagesRequest.FromString(captured.body).node
        more = PullMessagesRequest(node=node).SerializeToString() + b"\xba\x3e\x03abc"
        assert post(fleet, captured._replace(body=more)).status_code == 200
        # But not in the name of another device, nor at another time, nor to Control.
        _, other = signing(fleet, fleet.devices[0])
        as_other = ActivateNodeRequest(public_key=other, heartbeat_interval=30).SerializeToString()
        stranger = PullMessagesRequest(node=Node(node_id=node.node_id ^ 1)).SerializeToString()
        for call in (
            captured._replace(path="/v1/fleet/activate-node", body=as_other),
            captured._replace(body=stranger),
            captured._replace(headers={**captured.headers, **later(captured)}),
        ):
            with logged(fleet, f"{call.path}: 401, signed at", "or by another"):
                answer = post(fleet, call)
            assert answer.status_code == 401
            assert answer.json() == {"detail": "Invalid SuperNode authentication"}
        with logged(fleet, "/v1/control/list-nodes: 403, no call of a device"):
            assert post(fleet, captured._replace(path="/v1/control/list-nodes")).status_code == 403
        stop(fleet, [device.name])


def later(call: Call) -> dict[str, str]:
    """Return the header of a call's time, a second on."""
    signed = datetime.fromisoformat(call.headers["flwr-timestamp"]) + timedelta(seconds=1)
    return {"flwr-timestamp": signed.isoformat()}


@pytest.mark.parametrize(("age", "taken"), [(-10, False), (0, True), (290, True), (310, False)])
def test_headers_are_worth_nothing_after_five_minutes(fleet, online, monkeypatch, age, taken):
    node_id = int(re.search(r"SuperNode ID: (\d+)", said(fleet, online.name))[1])
    client, _ = signing(fleet, online)
    signed = datetime.now(UTC) - timedelta(seconds=age)
    monkeypatch.setattr("flwr.supernode.node_auth_http_interceptor.now", lambda: signed)
    request = PullMessagesRequest(node=Node(node_id=node_id))
    if taken:
        client.PullMessages(request)
        return
    with logged(fleet, f"pull-messages: 401, signed at {signed.isoformat()}"):
        with pytest.raises(httpx.HTTPStatusError) as caught:
            client.PullMessages(request)
        assert caught.value.response.status_code == 401


def test_a_plain_text_client_is_refused_with_the_reason(fleet, tmp_path):
    with logged(fleet, "400, plain text or no HTTP: this port speaks TLS alone"):
        told = "plain text: the server speaks TLS alone"
        assert told in refused(["--superlink", fleet.address, "--insecure"], tmp_path, told)
    with grpc.insecure_channel(fleet.address) as channel:
        call = channel.unary_unary("/flwr.proto.Fleet/PullMessages")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=9, wait_for_ready=False)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, caught.value
    # The SuperLink itself, which only this machine reaches, hangs up.
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"http://{fleet.superlink_address}/v1/fleet/pull-messages", timeout=9)


def test_a_message_larger_than_the_limit_is_refused(fleet, online):
    client, _ = signing(fleet, online)
    request = PushObjectRequest(object_content=bytes(17 * 2**20))
    with (
        logged(fleet, f"push-object: 413, a message of {request.ByteSize()} bytes"),
        pytest.raises(httpx.HTTPStatusError, match="413 Request Entity Too Large"),
    ):
        client.PushObject(request)


def test_a_run_goes_on_without_an_update_larger_than_the_limit(fleet, online, tmp_path):
    # An honest ClientApp sends its arrays in parts of 5 MiB, and so is never refused.
    large = "value.new_zeros(5_000_000) if value.ndim == 2 else value"
    become_hostile(
        *(fleet, 1, large, tmp_path / "large"),
        server=fleet.address,
        FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE="100000000",
    )
    with Control(fleet) as control:
        wait_for_devices(control, 150, lambda text: None)
    with Run(fleet, "large", rounds=1, cohort=2, server__round_timeout=40) as run:
        code, output = run.end()
    stop(fleet, ["device-1"])
    assert code == 0, output
    (line,) = run.lines("round")
    assert line["updates"] == 1
    assert losses(line).keys() == {1}
    assert losses(line)[1].startswith("only part of its reply came: a slow line, a part over the")
    assert "failed: client 1: only part of its reply came" in output
    assert line["seconds"] < 60
    assert "413 Request Entity Too Large" in said(fleet, "device-1")
    assert re.search(r"push-object: 413, a message of 20\d{6} bytes", said(fleet, REFUSALS))
