"""What is installed, and what fedkn needs to be: from a wheel or from a checkout."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["installed_version", "requirements"]


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[str]:
    """Return what fedkn needs, as PEP 508 has it, extras marked by ``extra == "…"``.

    Of a checkout that was never installed it is what its pyproject.toml says; empty where neither
    is to be had.
    """
    try:
        return metadata.requires("fedkn") or []
    except metadata.PackageNotFoundError:
        project = _project()
    needed = list(project.get("dependencies", []))
    for extra, entries in project.get("optional-dependencies", {}).items():
        for entry in entries:
            requirement, _, marker = entry.partition(";")
            condition = f'extra == "{extra}"'
            if marker:
                condition = f"({marker.strip()}) and {condition}"
            needed.append(f"{requirement.strip()}; {condition}")
    return needed


def _project() -> dict[str, Any]:
    """Return the table ``[project]`` of the checkout that this code runs from, empty elsewhere."""
    file = Path(__file__).parent.parent / "pyproject.toml"
    try:
        project: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return {}
    # Beside site-packages or in a bundle there may be somebody else's.
    return project if project.get("name") == "fedkn" else {}
