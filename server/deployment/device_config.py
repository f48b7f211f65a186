"""A device's own folder: device.toml, the certificate it trusts and its key."""

from __future__ import annotations

import json
import shutil

from server.deployment.certificates import create_device_key
from server.deployment.fleet import Device, Fleet, make_folder

__all__ = ["create_device_folder", "device_toml"]


def create_device_folder(fleet: Fleet, device: Device) -> None:
    """Write all that `device` needs into its folder, and its public key into the server's."""
    make_folder(device.folder)
    create_device_key(device.key, fleet.public_key(device), device.name)
    shutil.copyfile(fleet.authority, device.folder / "ca.crt")
    device.config.write_text(device_toml(fleet, device), encoding="utf-8")


def device_toml(fleet: Fleet, device: Device) -> str:
    """Return device.toml. Its paths are relative to its own folder."""
    return f"""\
# {device.name} of a fedkn fleet. Copy this folder to the device, then: fedkn device start .
name = "{device.name}"
server = {json.dumps(fleet.address)}
ca = "ca.crt"
key = "{device.key.name}"
partition_id = {device.partition}
partitions = {fleet.clients}
state = "{device.state.name}"

# The device's own images; without this table it holds its part of the experiment's data source.
# [data]
# source = "image_folder"
# root = "/path/to/images"

# What this device can bear, within the limits that the server's configuration allows.
# [profile]
# batch_size = 2
# threads = 1

# What runs may do with the images: see docs/device.md.
# [consent]
# private_only = true
# max_epsilon = 8.0
"""
