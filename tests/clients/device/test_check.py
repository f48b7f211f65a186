"""The checks of a device against real sockets, certificates and files."""

from __future__ import annotations

import email.utils
import json
import logging
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from clients.device.check import check_device, check_start
from clients.device.connection import check_connection
from clients.device.settings import read_device
from server.deployment.certificates import issue_certificate
from server.deployment.creation import create_fleet
from simulations.cli import main

EXPERIMENT = """
[experiment.model]
name = "resnet8"
width = 4
[experiment.train]
batch_size = 4
[experiment.partition]
scheme = "iid"
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    return create_fleet(tmp_path_factory.mktemp("fleet") / "f", 2, "localhost", 8443)


@pytest.fixture
def device(fleet):
    return read_device(fleet.devices[0].folder)


@contextmanager
def served(fleet, clock=time.time, tls=True):
    """Serve HTTP with the fleet's certificate, telling the time of `clock`; yield the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response_only(404)
            if (now := clock()) is not None:
                self.send_header("Date", email.utils.formatdate(now, usegmt=True))
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *given: None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(fleet.certificate, fleet.certificate_key)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def found(device, port, check=check_connection):
    return {finding.name: finding for finding in check(replace(device, port=port))}


def test_a_good_connection(fleet, device):
    with served(fleet) as port:
        findings = found(device, port)
    assert {name: one.status for name, one in findings.items()} == {
        "server": "ok",
        "TLS": "ok",
        "clock": "ok",
    }


@pytest.mark.parametrize(
    ("skew", "status", "message"),
    [
        (-400, "fail", "400 s ahead of"),
        (400, "fail", "400 s behind"),
        # Flower takes what was signed 5 s ahead of its clock, or 305 s behind.
        (-8, "fail", "8 s ahead of"),
        (100, "warn", "100 s behind"),
        (20, "ok", "20 s behind"),
    ],
)
def test_clocks_apart(fleet, device, skew, status, message):
    with served(fleet, lambda: time.time() + skew) as port:
        clock = found(device, port)["clock"]
    assert clock.status == status
    # The header has whole seconds.
    seconds = int(clock.message.split()[0])
    assert abs(seconds - abs(skew)) <= 2
    assert message.split(" s ")[1] in clock.message


def test_a_server_without_a_time(fleet, device):
    with served(fleet, lambda: None) as port:
        assert found(device, port)["clock"].status == "warn"


def test_expired_certificates_and_wrong_names_and_authorities(fleet, device, tmp_path):
    other = create_fleet(tmp_path / "other", 1, "elsewhere", 8443)
    with served(other) as port:
        assert "not signed by 'ca.crt'" in found(device, port)["TLS"].message
        trusting = replace(device, ca=other.authority, host="127.0.0.2")
        assert found(trusting, port)["server"].status == "fail"
    issue_certificate(other, timedelta(days=-3))
    with served(other) as port:
        tls = found(replace(device, ca=other.authority), port)["TLS"]
    assert tls.status == "fail"
    assert "expired (valid from" in tls.message
    assert "fedkn deploy up" in tls.fix


def test_another_name(fleet, device, monkeypatch):
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: resolve("127.0.0.1", *a, **k))
    with served(fleet) as port:
        tls = found(replace(device, host="server.other"), port)["TLS"]
    assert (tls.status, tls.message) == ("fail", "the certificate is not for 'server.other'")


def test_no_tls_and_nobody_there(fleet, device):
    with served(fleet, tls=False) as port:
        assert found(device, port)["TLS"].message.startswith("no TLS at localhost:")
    findings = found(device, port)
    assert list(findings) == ["server"]
    assert findings["server"].status == "fail"
    assert found(device, port, check_start)["server"].status == "warn"


def test_keys_and_certificates_that_are_missing_or_open_or_damaged(fleet, device, tmp_path):
    key = tmp_path / "key"
    key.write_bytes(device.key.read_bytes())
    key.chmod(0o644)

    def finding(name, **changes):
        return next(f for f in check_start(replace(device, port=1, **changes)) if f.name == name)

    assert finding("key").status == "ok"
    assert finding("key", key=key).fix == f"chmod 600 {key}"
    key.write_text("no key")
    key.chmod(0o600)
    assert "not an OpenSSH private key" in finding("key", key=key).message
    assert "No such file" in finding("key", key=tmp_path / "none").message
    assert finding("ca").status == "ok"
    assert "not a PEM certificate" in finding("ca", ca=key).message


def test_everything_at_once_trains_for_a_moment(fleet, device, digits_file):
    text = fleet.devices[0].config.read_text()
    device = fleet.devices[0].config.with_name("tried.toml")
    device.write_text(
        f'{text}{EXPERIMENT}\n[data]\nroot = "{digits_file}"\n[profile]\nbatch_size = 2\n'
    )
    with served(fleet) as port:
        findings = found(read_device(device), port, check_device)
    assert {one.status for one in findings.values()} <= {"ok", "warn"}
    assert "200 images to train on, by label 0: " in findings["data"].message
    assert "batch size 2 (the experiment asks for 4)" in findings["step's memory"].message
    assert "a round is 50 steps" in findings["step's time"].message


@pytest.fixture
def _flowers_logger(monkeypatch):
    """Take back the filter that the command line puts on Flower's logger."""
    monkeypatch.setattr(logging.getLogger("flwr"), "filters", [])


@pytest.mark.usefixtures("_flowers_logger")
def test_the_commands(fleet, device, capsys, tmp_path):
    own = fleet.devices[1].folder
    own.joinpath("device.toml").write_text(
        fleet.devices[1].config.read_text() + EXPERIMENT + '[data]\nroot = "nowhere.npz"\n'
    )
    with pytest.raises(SystemExit) as caught:
        main(["device", "check", str(own), "--json"])
    assert caught.value.code == 1
    findings = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["data"]["status"] == "fail"
    assert "no .npz file at" in findings["data"]["message"]
    assert findings["key"]["status"] == "ok"
    with pytest.raises(SystemExit) as caught:
        main(["device", "start", str(own)])
    assert caught.value.code == 1
    assert "fedkn: data: this device's data: no .npz file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["device", "start", str(tmp_path)])
    assert caught.value.code == 2
