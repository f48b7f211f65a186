"""Who has no key or no certificate, behind nginx and before the SuperLink itself: what it costs."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from server.deployment import programs
from server.deployment.certificates import create_authority, issue_device_certificate
from server.deployment.control import Control
from server.deployment.fleet import Device, Fleet
from server.deployment.logs import last_lines
from server.deployment.ports import free_port
from server.deployment.processes import main_processes, running, start
from server.deployment.proxy import REFUSALS
from server.deployment.startup import bring_up, wait_for_devices
from tests.deployment.fleets import FEDKN, a_fleet, fedkn, wait_for

NGINX = "/usr/sbin/nginx"
MIB = 2**20
LENGTH = 15_900_000


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    """A server behind its proxy, and a device that comes through it."""
    if not Path(NGINX).exists():
        pytest.skip("nginx is not installed: apt-get install nginx")
    with a_fleet(tmp_path_factory.mktemp("fleets") / "fleet", clients=1) as made:
        bring_up(made, local=False, say=lambda text: None)
        start(made, programs.supernode(made, made.devices[0], made.address, free_port()))
        with Control(made) as control:
            wait_for_devices(control, 150, lambda text: None)
        yield made


def context(fleet: Fleet, certificate: Path | None = None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(fleet.authority))
    if certificate:
        made.load_cert_chain(certificate)
    return made


class Stranger(threading.Thread):
    """Announces a body of 15.9 MB and sends of it what is taken, until it is answered."""

    def __init__(self, port: int, trust: ssl.SSLContext) -> None:
        super().__init__()
        self.sent, self.answer = 0, b""
        self._port, self._trust = port, trust

    def run(self) -> None:
        with (
            socket.create_connection(("127.0.0.1", self._port), timeout=30) as plain,
            self._trust.wrap_socket(plain, server_hostname="localhost") as connection,
            # A connection that is cut off has been refused as well.
            suppress(OSError),
        ):
            connection.sendall(
                b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/x-protobuf\r\n"
                b"Content-Length: %d\r\n\r\n" % LENGTH
            )
            connection.settimeout(0.05)
            deadline = time.monotonic() + 10
            while not self.answer and self.sent < LENGTH and time.monotonic() < deadline:
                with suppress(TimeoutError, ssl.SSLWantWriteError):
                    self.sent += connection.send(bytes(65536))
                with suppress(TimeoutError):
                    self.answer = connection.recv(65536)
                    if not self.answer:
                        return


def memory(fleet: Fleet, name: str) -> int:
    """Return the bytes that a program of the fleet holds by itself, with all that it started."""
    found = 0
    for one in running(fleet):
        if one.name == name:
            found += psutil.Process(one.pid).memory_full_info().uss
    return found


@pytest.mark.parametrize("server", ["proxy", "SuperLink"])
def test_forty_strangers_cost_next_to_nothing(fleet, server, record_property):
    port = fleet.port if server == "proxy" else fleet.superlink_port
    strangers = [Stranger(port, context(fleet)) for _ in range(40)]
    before = {name: memory(fleet, name) for name in ("superlink", "proxy")}
    most = dict(before)
    for stranger in strangers:
        stranger.start()
    while any(stranger.is_alive() for stranger in strangers):
        most = {name: max(most[name], memory(fleet, name)) for name in most}
        time.sleep(0.02)
    grown = {name: (most[name] - before[name]) / MIB for name in most}
    record_property(f"MiB more, {server}", grown)
    # Of their 636 MB; the kernel's buffers take what was sent before the answer came.
    assert all(value < 40 for value in grown.values()), grown
    assert all(stranger.sent < 4 * MIB for stranger in strangers)
    status = b"HTTP/1.1 400" if server == "proxy" else b"HTTP/1.1 401"
    answered = [stranger.answer for stranger in strangers if stranger.answer]
    assert answered
    assert all(answer.startswith(status) for answer in answered)
    with Control(fleet) as control:
        assert [state.status for state in control.devices()] == ["online"]


def test_a_certificate_is_of_this_fleet_or_none(fleet, tmp_path):
    other = Fleet(tmp_path, 1, "localhost", 1, 2)
    (tmp_path / "ca").mkdir()
    create_authority(other)
    device = Device("device-0", 0, tmp_path)
    issue_device_certificate(other, device)
    url = f"https://{fleet.address}/v1/fleet/pull-messages"
    for trust, why in (
        (context(fleet), "no certificate of this fleet: NONE"),
        (context(fleet, device.certificate), "no certificate of this fleet: FAILED"),
    ):
        answer = httpx.post(url, content=b"x", verify=trust)
        assert answer.status_code == 400
        assert answer.json()["detail"] == "no certificate of this fleet: device.pem"
        wait_for(lambda why=why: why in last_lines(fleet, REFUSALS, 1)[0])
    own = context(fleet, fleet.devices[0].certificate)
    answer = httpx.post(url, content=b"", verify=own)
    assert answer.status_code in (401, 415)


def test_a_device_whose_certificate_is_not_the_fleets_is_told_so(fleet, tmp_path):
    other = Fleet(tmp_path, 1, "localhost", 1, 2)
    (tmp_path / "ca").mkdir()
    create_authority(other)
    device = fleet.devices[0]
    right = device.certificate.read_bytes()
    try:
        issue_device_certificate(other, device)
        done = subprocess.run(
            [str(FEDKN), "device", "start", str(device.folder)],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 1
        assert "does not take 'device.pem'" in " ".join(done.stderr.split())
    finally:
        device.certificate.write_bytes(right)


@pytest.mark.parametrize("server", ["proxy", "SuperLink"])
def test_old_tls_is_not_spoken(fleet, server):
    port = fleet.port if server == "proxy" else fleet.superlink_port

    def shake(version: ssl.TLSVersion, ciphers: str) -> str:
        trust = context(fleet, fleet.devices[0].certificate)
        trust.minimum_version = trust.maximum_version = version
        trust.set_ciphers(ciphers + ":@SECLEVEL=0")
        try:
            with (
                socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
                trust.wrap_socket(plain, server_hostname="localhost") as connection,
            ):
                return connection.cipher()[0]
        except (ssl.SSLError, OSError):
            return ""

    assert shake(ssl.TLSVersion.TLSv1_2, "ECDHE+AESGCM")
    assert shake(ssl.TLSVersion.TLSv1_3, "ECDHE+AESGCM")
    for version, ciphers in (
        (ssl.TLSVersion.TLSv1_2, "ECDHE+AES:!AESGCM:!AESCCM"),
        (ssl.TLSVersion.TLSv1_2, "kRSA:DHE"),
        (ssl.TLSVersion.TLSv1_1, "ALL"),
        (ssl.TLSVersion.TLSv1, "ALL"),
    ):
        assert shake(version, ciphers) == "", (version, ciphers)


def test_nobody_takes_a_task_from_a_supernode(fleet):
    """Another user of the device finds the port, and knows no secret."""
    device = fleet.devices[0]
    pid = main_processes(fleet)[device.name].pid
    (port,) = {
        one.laddr.port
        for one in psutil.net_connections("tcp")
        if one.pid == pid and one.status == psutil.CONN_LISTEN
    }
    client = RuntimeHttpClient.from_server_address(
        server_address=f"127.0.0.1:{port}",
        insecure=True,
        root_certificates=None,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
    )
    with pytest.raises(httpx.HTTPStatusError) as refused:
        client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
    assert refused.value.response.status_code in (401, 403)
    secret = fleet.home(device.name) / "superexec.secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_bytes()) == 32


def test_status_tells_sizes(fleet):
    done = fedkn("status", str(fleet.path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SuperLink's database" in done.stdout


def test_no_secret_is_in_a_log(fleet):
    secrets = [fleet.signing_key, fleet.certificate_key, fleet.devices[0].certificate]
    lines = [line for path in secrets for line in path.read_text().splitlines()[1:-1]]
    for log in (fleet.path / "logs").iterdir():
        text = log.read_text(errors="replace")
        assert not [line for line in lines if line and line in text], log
