"""What would go wrong on this machine, and how to mend it: the checks of ``fedkn doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from packaging.requirements import Requirement

from fedkn import __version__
from fedkn.data.vision import import_torchvision, way_round_taken
from fedkn.errors import UserError
from fedkn.installation import installed_version, requirements
from fedkn.layers.native import library as native
from fedkn.machine import usable_cores

__all__ = ["Finding", "diagnose"]

_GIB = 2**30
_TORCH = "https://pytorch.org/get-started"
_FLOWER_PORTS = {
    8000: "a Flower SuperLink's default",
    39091: "what 'flwr run' starts its SuperLink on",
}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis. `fix` is empty where nothing is to be done."""

    name: str
    status: Literal["ok", "warn", "fail"]
    message: str
    fix: str = ""


def diagnose(folder: Path) -> list[Finding]:
    """Return every finding; `folder` is where runs would be written."""
    return [
        *_packages(),
        _torchvision(),
        _gpu(),
        _memory(),
        _disk(folder),
        *_ports(),
        _native_kernels(),
        _flower_home(),
    ]


def _packages() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())
    yield _fedkn()
    for text in requirements():
        requirement = Requirement(text)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        simulation = requirement.marker is not None and requirement.marker.evaluate(
            {"extra": "simulation"}
        )
        if needed or simulation:
            yield _package(requirement, needed=needed)


def _fedkn() -> Finding:
    if installed_version("fedkn"):
        return Finding("fedkn", "ok", __version__)
    folder = Path(__file__).parent.parent
    message = f"{__version__}, not installed: run from '{folder}'"
    if not requirements():
        message += "; which versions it needs is not known here"
    return Finding("fedkn", "warn", message, f"pip install -e '{folder}'")


def _package(requirement: Requirement, *, needed: bool) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    found = installed_version(name)
    if found is None:
        status: Literal["warn", "fail"] = "fail" if needed else "warn"
        extra = "" if needed else "[simulation]"
        return Finding(name, status, "not installed", f"pip install 'fedkn{extra}'")
    # A local build such as 2.13.0+cpu is of the release before the plus.
    if not requirement.specifier.contains(found.partition("+")[0], prereleases=True):
        fix = f"pip install '{name}{wanted}'"
        return Finding(name, "fail", f"{found}, but fedkn supports {wanted}", fix)
    return Finding(name, "ok", f"{found} ({wanted})")


def _torchvision() -> Finding:
    name = "torchvision's import"
    try:
        torchvision = import_torchvision()
    except UserError as error:
        return Finding(name, "warn", "data sets other than digits cannot be read", str(error))
    except Exception as error:
        first = str(error).partition("\n")[0]
        fix = f"install the torchvision that belongs to your torch: {_TORCH}"
        return Finding(name, "fail", f"{type(error).__name__}: {first}", fix)
    if way_round_taken():
        message = (
            f"fails by itself: the compiled part of {torchvision.__version__} does not load beside "
            f"torch {torch.__version__}. fedkn goes round that by declaring torchvision's "
            "operators, and reads data sets all the same; other programs cannot"
        )
        fix = "for those, install the torchvision that belongs to your torch: " + _TORCH
        return Finding(name, "warn", message, fix)
    return Finding(name, "ok", "works")


def _gpu() -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", ", ".join(names))
    if Path("/dev/nvidia0").exists():
        fix = f"install a CUDA build: {_TORCH}; check nvidia-smi"
        return Finding("GPU", "warn", f"there is one, but torch {torch.__version__} has none", fix)
    return Finding("GPU", "ok", "none; the CPU is used")


def _memory() -> Finding:
    available = psutil.virtual_memory().available
    workers = usable_cores()
    message = f"{available / _GIB:.1f} GiB available for {workers} workers"
    if available < workers * _GIB:
        fix = f"close programs, or give --workers {max(1, available // _GIB)}"
        return Finding("memory", "warn", message, fix)
    return Finding("memory", "ok", message)


def _disk(folder: Path) -> Finding:
    existing = _nearest_folder(folder)
    free = shutil.disk_usage(existing).free
    message = f"{free / _GIB:.1f} GiB free for '{folder}'"
    if not os.access(existing, os.W_OK):
        return Finding("disk", "fail", f"'{folder}' cannot be written", "give --out elsewhere")
    if free < _GIB // 4:
        return Finding("disk", "fail", message, "free some, or give --out elsewhere")
    if free < 2 * _GIB:
        return Finding("disk", "warn", message, "large models' checkpoints may fill it")
    return Finding("disk", "ok", message)


def _ports() -> Iterator[Finding]:
    for port, purpose in _FLOWER_PORTS.items():
        with socket.socket() as probe:
            # As servers do: a port that was closed a moment ago counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                message = f"in use ({purpose}); fedkn's own commands do not need it"
                fix = "for Flower: stop what listens there, or give Flower another --port"
                yield Finding(f"port {port}", "warn", message, fix)
                continue
        yield Finding(f"port {port}", "ok", f"free ({purpose})")


def _native_kernels() -> Finding:
    try:
        wish = native.wished()
    except UserError as error:
        return Finding("native kernels", "fail", str(error), "set FEDKN_NATIVE to auto, 0 or 1")
    if wish == "0":
        return Finding("native kernels", "ok", "switched off by FEDKN_NATIVE=0")
    compiler = native.compiler()
    if compiler is None:
        message = "no C++ compiler, so no native kernels: PyTorch's own are used"
        return Finding("native kernels", "warn", message, "install g++ (apt-get install g++)")
    return Finding("native kernels", "ok", f"built by {compiler[0]}")


def _flower_home() -> Finding:
    home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
    if os.access(_nearest_folder(home), os.W_OK):
        return Finding("FLWR_HOME", "ok", str(home))
    fix = "export FLWR_HOME to a folder that can be written"
    return Finding("FLWR_HOME", "warn", f"'{home}' cannot be written: no flwr run", fix)


def _nearest_folder(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
