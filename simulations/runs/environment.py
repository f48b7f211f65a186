"""Where a run took place: versions, machine, code and time, as environment.json records them."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from fedkn import __version__
from fedkn.gpus import device_name
from fedkn.installation import installed_version
from fedkn.machine import processor, usable_cores

__all__ = ["PACKAGES", "describe_environment"]

PACKAGES = ("fedkn", "torch", "torchvision", "flwr", "numpy", "scikit-learn", "opacus", "ray")
"""The packages on which numbers may depend."""


def describe_environment() -> dict[str, object]:
    """Return versions, machine, git commit and the time (UTC)."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {
            **{name: installed_version(name) or "not installed" for name in PACKAGES},
            "fedkn": __version__,
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "processor": processor(),
            "cores": usable_cores(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": "; ".join(_gpus()) or "none",
        },
    }


def _commit() -> str:
    """Return the commit of the checkout that this code runs from, marked where it was changed."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return "not a checkout"
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


def _gpus() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [device_name(torch.device("cuda", index)) for index in range(count)]
