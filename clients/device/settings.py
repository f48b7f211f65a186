"""device.toml: who this device is, where its server is, and what it brings along."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from clients.device.consent import Consent
from clients.device.data import node_data
from clients.device.profile import Profile
from clients.instructions import SERVER_KEY
from clients.local_state import STATE_FOLDER
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.files import expanded
from fedkn.sections import Section, check_keys, validated
from fedkn.signatures import public_key
from fedkn.supernode import uncarried
from fedkn.tables import read_toml
from fedkn.text import printable

__all__ = ["Device", "read_device"]


class _Data(Section):
    source: str = Field("", description="image_folder, arrays, mnist, … (empty: by what is there)")
    root: str = Field("", description="folder or .npz file of the device's own images")


class _Settings(Section):
    name: str = Field(min_length=1, description="the device's name in logs")
    server: str = Field(description="host:port of the fleet's server")
    ca: str = Field("ca.crt", description="certificate that signed the server's")
    key: str = Field("device.key", description="private key of this device, OpenSSH on P-384")
    certificate: str = Field("device.pem", description="what it shows the proxy, with its key")
    server_key: str = Field("", description="public key of the server, which signs instructions")
    partition_id: int = Field(ge=0, description="which client of the experiment this device is")
    partitions: int = Field(ge=1, description="number of clients of the experiment")
    state: str = Field("state", description="folder for what the client keeps between rounds")
    data: _Data = _Data()
    profile: Profile = Profile()
    consent: Consent = Consent()


@dataclass(frozen=True)
class Device:
    """A device as its device.toml describes it; paths are absolute.

    Attributes:
        folder: of device.toml. ca, key, certificate: files. server_key: hexadecimal digits, or
            none. state: a folder, which need not exist yet.
        experiment: the keys of the table ``[experiment]``, for `fedkn device check`.
    """

    name: str
    folder: Path
    host: str
    port: int
    ca: Path
    key: Path
    certificate: Path
    server_key: str
    partition: int
    partitions: int
    state: Path
    data_path: str
    data_kind: str
    profile: Profile
    consent: Consent
    experiment: ExperimentConfig

    @property
    def server(self) -> str:
        """The server as ``host:port``, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def node_config(self) -> dict[str, str | int | float]:
        """Return what the ClientApp is told about this device: the SuperNode's node config."""
        own = {
            SERVER_KEY: self.server_key,
            "data-path": self.data_path,
            "data-kind": self.data_kind,
        }
        return {
            "partition-id": self.partition,
            "num-partitions": self.partitions,
            "device-name": self.name,
            STATE_FOLDER: str(self.state),
            **{key: value for key, value in own.items() if value},
            **self.profile.node_config(),
            **self.consent.node_config(),
        }


def read_device(path: Path, experiment: Path | None = None) -> Device:
    """Read a device.toml, or the one in the folder `path`. Its paths are relative to its folder.

    Args:
        experiment: a TOML file whose keys count over those of the table ``[experiment]``.

    Raises:
        UserError: no such file, or an entry that is unknown, missing or impossible.
    """
    file = (path / "device.toml" if path.is_dir() else path).absolute()
    if not file.is_file():
        raise UserError(f"no '{file}': give the folder that fedkn deploy init made for this device")
    values = read_toml(file)
    tried = values.pop("experiment", {})
    try:
        return _device(file.parent, values, tried, read_toml(experiment) if experiment else {})
    except UserError as error:
        raise UserError(f"{printable(file, 1000)}: {error}") from None


def _device(
    folder: Path, values: dict[str, Any], tried: Mapping[str, Any], other: Mapping[str, Any]
) -> Device:
    check_keys(_Settings, _keys(values))
    given = validated(_Settings, values)
    host, port = _address(given.server)
    if given.partition_id >= given.partitions:
        raise UserError(
            f"partition_id = {given.partition_id}: must be below partitions = {given.partitions}"
        )
    if given.server_key:
        public_key(given.server_key)
    data_path = str(folder / expanded(given.data.root)) if given.data.root else ""
    given.consent.check_names()
    node_data({"data-path": data_path, "data-kind": given.data.source})
    for text in (given.name, data_path, str(folder / given.state)):
        if reason := uncarried(text):
            raise UserError(f"'{printable(text)}' {reason}: rename it")
    return Device(
        name=given.name,
        folder=folder,
        host=host,
        port=port,
        ca=folder / given.ca,
        key=folder / given.key,
        certificate=folder / given.certificate,
        server_key=given.server_key,
        partition=given.partition_id,
        partitions=given.partitions,
        state=folder / given.state,
        data_path=data_path,
        data_kind=given.data.source,
        profile=given.profile,
        consent=given.consent,
        # As many clients as the fleet has, unless the experiment says otherwise.
        experiment=ExperimentConfig.resolve({"partition.clients": 0}, tried, other).for_nodes(
            given.partitions
        ),
    )


def _address(server: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})", server)
    if not match or not 0 < int(match[2]) < 2**16:
        raise UserError(
            f"server = {printable(json.dumps(server), 80)}: give HOST:PORT, without https://"
        )
    return match[1].strip("[]"), int(match[2])


def _keys(values: Mapping[str, Any]) -> list[str]:
    keys = []
    for key, value in values.items():
        keys += [f"{key}.{inner}" for inner in value] if isinstance(value, Mapping) else [key]
    return keys
