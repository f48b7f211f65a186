"""What `fedkn deploy init` writes: certificates, keys, modes, and texts that their readers take."""

from __future__ import annotations

import logging
import re
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
import tomllib
import zipfile
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.build import build_fab_from_disk

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from server.deployment import startup
from server.deployment.bundle import build_bundle
from server.deployment.certificates import expiry, issue_certificate, public_pem, server_key
from server.deployment.creation import create_fleet
from server.deployment.fleet import Fleet
from server.deployment.ports import check_free, free_port
from server.deployment.programs import supernode
from simulations.cli import main

ROOT = Path(__file__).parents[3]

SECRET = (".key", ".secret", ".pem")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Fleet:
    return create_fleet(tmp_path_factory.mktemp("fleets") / "fleet", 3, "server.local", 18443)


def test_it_can_be_opened_again(fleet):
    assert Fleet.open(fleet.path) == fleet
    assert fleet.address == "server.local:18443"


def test_secrets_are_their_owners_alone(fleet):
    secret = [path for kind in SECRET for path in fleet.path.rglob(f"*{kind}")]
    assert len(secret) == 3 + 1 + 2 * fleet.clients
    for path in secret:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for path in [fleet.path, *(p for p in fleet.path.rglob("*") if p.is_dir())]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_no_text_holds_a_private_key(fleet):
    for path in fleet.path.rglob("*"):
        if path.is_file() and path.suffix not in SECRET:
            assert b"PRIVATE KEY" not in path.read_bytes(), path


def test_a_fleet_of_an_older_fedkn_is_told_to_begin_anew(fleet, tmp_path):
    text = (fleet.path / "fleet.toml").read_text()
    (tmp_path / "fleet.toml").write_text(text.replace("format = 2", "format = 1"))
    with pytest.raises(UserError, match="make a new fleet with fedkn deploy init"):
        Fleet.open(tmp_path)


def test_device_certificates_are_the_authoritys_and_the_servers_opens_no_door(fleet):
    """A device's certificate is taken of a client, and the server's is not."""
    device = fleet.devices[0]
    assert mutual_handshake(fleet, device.certificate) is None
    own = Path(tempfile.mkdtemp(dir=fleet.path)) / "server.pem"
    own.write_bytes(fleet.certificate.read_bytes() + fleet.certificate_key.read_bytes())
    assert "purpose" in str(mutual_handshake(fleet, own))
    shutil.rmtree(own.parent)


def mutual_handshake(fleet: Fleet, certificate: Path) -> ssl.SSLError | None:
    """Connect to a server that asks for a certificate; return why it did not take the client's."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(fleet.authority))
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_cert_chain(fleet.certificate, fleet.certificate_key)
    client = ssl.create_default_context(cafile=str(fleet.authority))
    client.load_cert_chain(certificate)
    here, there = socket.socketpair()
    refused: list[ssl.SSLError] = []

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True) as connection:
                connection.recv(1)
        except ssl.SSLError as error:
            refused.append(error)
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(here, server_hostname="localhost") as connection:
            connection.send(b"x")
    except OSError:
        pass
    finally:
        here.close()
        thread.join(timeout=10)
    return refused[0] if refused else None


@pytest.mark.parametrize("name", ["server.local", "localhost", "127.0.0.1"])
def test_the_certificate_is_believed_for_each_of_its_names(fleet, name):
    assert handshake(fleet, name) is None


def test_the_certificate_is_not_believed_for_another_name(fleet):
    assert "mismatch" in str(handshake(fleet, "elsewhere.local"))


def test_an_expired_certificate_is_not_believed(tmp_path):
    own = create_fleet(tmp_path / "f", 1, "localhost", 18443)
    issue_certificate(own, timedelta(days=-2))
    assert expiry(own) < datetime.now(UTC)
    assert "expired" in str(handshake(own, "localhost"))


def handshake(fleet: Fleet, name: str) -> ssl.SSLError | None:
    """Connect as a device would, and return why the server was not believed."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(fleet.certificate, fleet.certificate_key)
    client = ssl.create_default_context(cafile=str(fleet.devices[0].folder / "ca.crt"))
    here, there = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True):
                pass
        except (ssl.SSLError, OSError):
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(here, server_hostname=name):
            return None
    except ssl.SSLError as error:
        return error
    finally:
        here.close()
        thread.join(timeout=10)


def test_device_keys_are_p384_and_fit_their_public_halves(fleet):
    for device in fleet.devices:
        key = load_ssh_private_key(device.key.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp384r1"
    pems = {public_pem(fleet.public_key(device)) for device in fleet.devices}
    assert len(pems) == fleet.clients


def test_device_toml(fleet):
    device = fleet.devices[2]
    values = tomllib.loads(device.config.read_text())
    assert values == {
        "name": "device-2",
        "server": "server.local:18443",
        "ca": "ca.crt",
        "key": "device.key",
        "certificate": "device.pem",
        "server_key": server_key(fleet),
        "partition_id": 2,
        "partitions": 3,
        "state": "state",
    }
    assert (device.folder / values["ca"]).read_bytes() == fleet.authority.read_bytes()


def test_a_supernodes_node_config_is_what_the_client_reads(fleet):
    from flwr.common.config import parse_config_args

    device = fleet.devices[1]
    command = supernode(fleet, device, "127.0.0.1:1", 2).command
    text = command[command.index("--node-config") + 1]
    assert parse_config_args([text]) == {
        "partition-id": 1,
        "num-partitions": 3,
        "device-name": "device-1",
        "state-folder": str(device.state),
        "server-key": server_key(fleet),
    }


def test_a_local_supernode_is_told_what_device_toml_says(monkeypatch, tmp_path):
    """From the command line to the command: data and limits of the device's own."""
    from flwr.common.config import parse_config_args

    own = create_fleet(tmp_path / "f", 2, "localhost", 18443)
    device = own.devices[1]
    with device.config.open("a", encoding="utf-8") as file:
        file.write('[data]\nroot = "my images"\n[profile]\nbatch_size = 2\nthreads = 3\n')
    started = {}
    monkeypatch.setattr(startup, "main_processes", lambda fleet: {})
    monkeypatch.setattr(startup, "stop", lambda fleet, names: [])
    monkeypatch.setattr(startup, "start", lambda fleet, one: started.update({one.name: one}))

    def bring_up(fleet, *, local, say, node_configs):
        startup._start_missing(fleet, fleet.devices, node_configs)

    monkeypatch.setattr(startup, "bring_up", bring_up)
    # The command line puts a filter there.
    monkeypatch.setattr(logging.getLogger("flwr"), "filters", [])
    with pytest.raises(SystemExit, match="0"):
        main(["deploy", "up", str(own.path), "--local"])
    plain, told = (started[one.name] for one in own.devices)
    node = parse_config_args([told.command[told.command.index("--node-config") + 1]])
    assert node == {
        "partition-id": 1,
        "num-partitions": 2,
        "device-name": "device-1",
        "state-folder": str(device.state),
        "server-key": server_key(own),
        "data-path": str(device.folder / "my images"),
        "batch-size": 2,
        "threads": 3,
    }
    assert told.command[told.command.index("--superlink") + 1] == own.superlink_address
    assert told.environment["OMP_NUM_THREADS"] == "3"
    bare = supernode(own, own.devices[0], own.superlink_address, 1)
    assert parse_config_args([plain.command[-1]]) == parse_config_args([bare.command[-1]])
    assert plain.environment == bare.environment


def test_the_superlink_listens_on_this_machine_alone(fleet):
    unit = (fleet.path / "systemd" / "fedkn-superlink.service").read_text()
    assert "--host 127.0.0.1" in unit
    assert "--enable-supernode-auth" in unit


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_every_service_is_exposed_little(fleet):
    units = [*(fleet.path / "systemd").iterdir(), fleet.devices[0].folder / "fedkn-device.service"]
    assert len(units) == 4
    for path in units:
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        figure = re.search(r"Overall exposure level for .*: ([0-9.]+)", done.stdout)
        if figure is None:
            pytest.skip(f"this systemd-analyze reads no files: {done.stderr}")
        assert float(figure[1]) <= 3.0, done.stdout


def test_no_service_is_root_and_none_sees_the_authoritys_key(fleet):
    for path in (fleet.path / "systemd").iterdir():
        unit = path.read_text()
        assert "User=root" not in unit
        assert f"InaccessiblePaths=-{fleet.authority_key}" in unit
        assert f"InaccessiblePaths=-{fleet.path / 'devices'}" in unit


def test_containers_see_the_keys_that_they_use(fleet):
    services = yaml.safe_load((fleet.path / "containers" / "compose.yaml").read_text())["services"]
    services |= yaml.safe_load((fleet.path / "containers" / "compose.device.yaml").read_text())[
        "services"
    ]
    for name, service in services.items():
        assert service["user"] == "1000:1000", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        seen = [Path(volume.split(":")[0]) for volume in service["volumes"]]
        if name != "device":
            hidden = (fleet.authority_key, fleet.devices[0].key)
            assert not [s for s in seen for key in hidden if key == s or s in key.parents], name
    proxy = [Path(volume.split(":")[0]) for volume in services["proxy"]["volumes"]]
    assert fleet.certificate_key in proxy
    assert not [p for p in proxy if p in (fleet.path, fleet.signing_key.parent)]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_takes_the_units(fleet):
    for path in (fleet.path / "systemd").iterdir():
        done = subprocess.run(
            ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
        )
        # It complains of other units of the machine, and of nginx where it is not installed.
        own = [line for line in done.stderr.splitlines() if path.name in line]
        assert not [line for line in own if "executable" not in line], own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "localhost", 8443), "at least one device"),
        ((3, "not a host", 8443), "--host"),
        ((3, "localhost", 80), "--port"),
    ],
)
def test_settings_that_cannot_be_write_nothing(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        create_fleet(tmp_path / "f", *arguments)
    assert not (tmp_path / "f").exists()


def test_a_folder_with_something_in_it_is_refused(fleet):
    before = fleet.authority_key.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        create_fleet(fleet.path, 3, "localhost", 8443)
    assert fleet.authority_key.read_bytes() == before


def test_a_taken_port_names_itself_and_its_holder():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} .*held by .*pid \d+.*: do this"):
            check_free(port, "127.0.0.1", "do this")
    check_free(free_port(), "127.0.0.1", "")


def python_files(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.endswith(".py")}


def what_runs_in_a_fleet() -> set[str]:
    folders = (ROOT / package for package in ("fedkn", "clients", "server"))
    files = {path.relative_to(ROOT).as_posix() for one in folders for path in one.rglob("*.py")}
    assert {"server/app.py", "server/rounds/loop.py", "clients/app.py"} <= files
    return {name for name in files if not name.startswith("server/deployment/")}


def test_what_flwr_bundles_of_a_checkout_leaves_out_what_starts_a_fleet_and_nothing_else():
    with zipfile.ZipFile(BytesIO(build_fab_from_disk(ROOT))) as bundle:
        assert python_files(bundle.namelist()) == what_runs_in_a_fleet()


def test_the_bundle_holds_the_code_and_every_default():
    with zipfile.ZipFile(BytesIO(build_bundle())) as bundle:
        names = set(bundle.namelist())
        project = tomllib.loads(bundle.read("pyproject.toml").decode())
    assert python_files(names) == what_runs_in_a_fleet()
    config = project["tool"]["flwr"]["app"]["config"]
    defaults = ExperimentConfig.resolve(config).overlay(partition__clients=20)
    assert defaults == ExperimentConfig().overlay(partition__clients=20)
