"""The fleet folder: who is in the fleet, where the server is, and where everything lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkn.errors import UserError
from fedkn.files import write_atomically
from fedkn.tables import read_toml, shown

__all__ = ["Device", "Fleet", "make_folder", "write_secret"]

FORMAT = 2


@dataclass(frozen=True)
class Device:
    """A device of a fleet: its partition, and its own folder, which is copied to it."""

    name: str
    partition: int
    folder: Path

    @property
    def config(self) -> Path:
        """What `fedkn device start` reads."""
        return self.folder / "device.toml"

    @property
    def key(self) -> Path:
        """The private key, an OpenSSH one on P-384."""
        return self.folder / "device.key"

    @property
    def certificate(self) -> Path:
        """What it shows the proxy: a certificate of the fleet's authority, and its key, in PEM."""
        return self.folder / "device.pem"

    @property
    def state(self) -> Path:
        """Where the client keeps its local tensors."""
        return self.folder / "state"


@dataclass(frozen=True)
class Fleet:
    """A fleet folder (docs/deployment.md shows its tree).

    Attributes:
        path: absolute. clients: number of devices, each of which is one partition.
        host, port: where devices reach the server: the proxy.
        superlink_port: the SuperLink's own, on 127.0.0.1 alone.
    """

    path: Path
    clients: int
    host: str
    port: int
    superlink_port: int

    @classmethod
    def open(cls, path: Path) -> Fleet:
        """Read the fleet in the folder `path`. Raises UserError if there is none."""
        file = path / "fleet.toml"
        if not file.is_file():
            raise UserError(f"no fleet in '{path}': make one with fedkn deploy init {path}")
        try:
            values = read_toml(file)
            if values.pop("format") != FORMAT:
                raise UserError(
                    f"'{file}' is of another version of fedkn: make a new fleet with fedkn deploy "
                    "init, and copy the devices their new folders"
                )
            return cls(
                path.resolve(), **{key: check(values[key]) for key, check in _FIELDS.items()}
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"'{file}' cannot be read as a fleet: {error}") from None

    def write(self) -> None:
        """Write fleet.toml."""
        (self.path / "fleet.toml").write_text(
            "# Written by fedkn deploy init. Devices have host and port in their device.toml.\n"
            f"format = {FORMAT}\n"
            f"clients = {self.clients}\n"
            f'host = "{self.host}"\n'
            f"port = {self.port}\n"
            f"superlink_port = {self.superlink_port}\n",
            encoding="utf-8",
        )

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices in the order of their partitions."""
        width = len(str(self.clients - 1))
        names = (f"device-{partition:0{width}}" for partition in range(self.clients))
        folder = self.path / "devices"
        return tuple(Device(name, i, folder / name) for i, name in enumerate(names))

    @property
    def address(self) -> str:
        """Where devices find the server."""
        return f"{bracketed(self.host)}:{self.port}"

    @property
    def superlink_address(self) -> str:
        """Where this machine alone finds the SuperLink."""
        return f"127.0.0.1:{self.superlink_port}"

    @property
    def authority(self) -> Path:
        """The certificate that devices trust."""
        return self.path / "ca" / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """The key that signs server certificates: needed on no machine that runs anything."""
        return self.path / "ca" / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.path / "server" / "server.crt"

    @property
    def certificate_key(self) -> Path:
        """The key of the server's certificate."""
        return self.path / "server" / "server.key"

    @property
    def signing_key(self) -> Path:
        """The key with which the server signs what it asks of devices: Ed25519, in PEM."""
        return self.path / "server" / "signing.key"

    @property
    def superexec_secret(self) -> Path:
        """What the SuperExec shows the SuperLink before it is given a ServerApp to run."""
        return self.path / "server" / "superexec.secret"

    @property
    def database(self) -> Path:
        """The SuperLink's state: nodes, runs and messages outlive its process."""
        return self.path / "server" / "state.db"

    @property
    def run_files(self) -> Path:
        """What the server is told of every run, and no device."""
        return self.path / "server" / "runs"

    @property
    def proxy_config(self) -> Path:
        """The configuration of nginx."""
        return self.path / "proxy" / "nginx.conf"

    @property
    def runs(self) -> Path:
        """The run folders of this fleet."""
        return self.path / "runs"

    def public_key(self, device: Device) -> Path:
        """The key under which the server knows `device`."""
        return self.path / "keys" / f"{device.name}.pub"

    def home(self, process: str) -> Path:
        """FLWR_HOME and working folder of a process: each has its own."""
        return self.path / "homes" / process

    def log(self, process: str) -> Path:
        """What a process prints."""
        return self.path / "logs" / f"{process}.log"


def bracketed(host: str) -> str:
    """Return `host` as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def make_folder(path: Path) -> Path:
    """Make a folder that only its owner may look into (mode 0700), and return it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read (mode 0600), whole or not at all."""
    write_atomically(path, content, mode=0o600)


def _whole(largest: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise TypeError(f"clients and ports are whole numbers, here from 1 to {largest}")
        return value

    return check


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{shown(value)} is no name of a host")
    return value


_FIELDS: dict[str, Callable[[object], Any]] = {
    "clients": _whole(100_000),
    "host": _name,
    "port": _whole(65535),
    "superlink_port": _whole(65535),
}
