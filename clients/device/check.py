"""Whether a device can take part: the checks of ``fedkn device check`` and ``start``."""

from __future__ import annotations

import os
import platform
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from cryptography.x509 import load_pem_x509_certificates

from clients.device.connection import check_connection
from clients.device.finding import Finding
from clients.device.profile import MIB
from clients.device.settings import Device
from clients.device.trial import check_data, check_training
from clients.privacy_account import account_in
from fedkn.errors import UserError

__all__ = ["check_device", "check_start"]


def check_device(device: Device) -> Iterator[Finding]:
    """Yield every finding, as soon as it is there."""
    yield Finding("Python", "ok", f"{platform.python_version()} on {platform.machine()}")
    yield Finding("torch", "ok", torch.__version__)
    yield _memory()
    yield _disk(device)
    yield _threads(device)
    yield from _files(device)
    yield from _owner(device)
    yield from check_connection(device)
    findings, session = check_data(device)
    yield from findings
    # As many as a SuperNode's training processes are given.
    torch.set_num_threads(device.profile.threads or 1)
    if session is not None:
        yield from check_training(session, device.partition)


def check_start(device: Device) -> Iterator[Finding]:
    """Yield the findings on what a SuperNode would complain about late, or never.

    That the server does not answer is a warning: a device may come up before its server.
    """
    yield from _files(device)
    yield from _owner(device)
    for found in check_connection(device):
        early = found.name == "server" and found.status == "fail"
        yield Finding(found.name, "warn", found.message, found.fix) if early else found
    if device.data_path:
        yield from check_data(device)[0]


def _memory() -> Finding:
    free = psutil.virtual_memory().available
    message = f"{free / MIB:.0f} MiB free"
    if free < _LITTLE_MEMORY:
        fix = "close other programs, or add swap: Python and torch alone take about 400 MiB"
        return Finding("memory", "warn", message, fix)
    return Finding("memory", "ok", message)


def _disk(device: Device) -> Finding:
    free = shutil.disk_usage(device.folder).free
    message = f"{free / MIB:.0f} MiB free in '{device.folder}'"
    if not os.access(device.folder, os.W_OK):
        fix = "give the folder to the user who starts the device"
        return Finding("disk", "fail", f"'{device.folder}' cannot be written", fix)
    if free < _LITTLE_DISK:
        return Finding("disk", "warn", message, "free some: bundles and local state need room")
    return Finding("disk", "ok", message)


def _threads(device: Device) -> Finding:
    cores = len(os.sched_getaffinity(0))
    threads = device.profile.threads or 1
    message = f"{threads} of {cores} core(s)"
    if threads > cores:
        return Finding("threads", "warn", message, f"set threads = {cores} in [profile]")
    return Finding("threads", "ok", message)


def _files(device: Device) -> Iterator[Finding]:
    yield _authority(device.ca)
    yield _key(device.key)


def _owner(device: Device) -> Iterator[Finding]:
    """Yield what the images have spent so far, if anything, and what the owner lets runs do."""
    consent = device.consent
    account = account_in(device.state, device.partition)
    try:
        spent = account.lifetime()
    except UserError as error:
        yield Finding("privacy account", "fail", str(error), "see docs/privacy.md")
        return
    if spent.history or consent.max_epsilon:
        cap = f" of {consent.max_epsilon:g}" if consent.max_epsilon else ""
        message = f"epsilon {spent.epsilon(consent.delta):.4g}{cap} at delta {consent.delta:g}"
        yield Finding("privacy account", "ok", f"{message}, in all runs together")
    if decided := consent.node_config():
        yield Finding("consent", "ok", ", ".join(f"{k} = {v}" for k, v in decided.items()))


def _authority(path: Path) -> Finding:
    try:
        load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a PEM certificate"
        return Finding("ca", "fail", f"'{path}': {why}", "copy the fleet's ca.crt there")
    return Finding("ca", "ok", str(path))


def _key(path: Path) -> Finding:
    try:
        load_ssh_private_key(path.read_bytes(), password=None)
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        fix = "copy the device's whole folder from the fleet; let the user who starts it own it"
        return Finding("key", "fail", f"'{path}': {error.strerror}", fix)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        fix = "copy device.key from the fleet's folder of this device"
        return Finding("key", "fail", f"'{path}' is not an OpenSSH private key", fix)
    if mode & 0o077:
        return Finding(
            "key", "fail", f"'{path}' has mode {mode:04o}: others may read it", f"chmod 600 {path}"
        )
    return Finding("key", "ok", f"{path}, mode {mode:04o}")


_LITTLE_MEMORY = 512 * MIB
_LITTLE_DISK = 200 * MIB
