import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fedkn
from fedkn import installation
from fedkn.installation import installed_version, requirements

PROJECT = Path(fedkn.__file__).parent.parent / "pyproject.toml"


def test_the_codes_version_is_the_projects() -> None:
    assert fedkn.__version__ == tomllib.loads(PROJECT.read_text())["project"]["version"]


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert installed_version("no-such-package-of-fedkn") is None


def test_a_checkout_needs_what_its_wheel_would_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hatchling wrote the installed metadata from the same pyproject.toml."""

    def needed(extra: str) -> set[tuple[str, str]]:
        found = map(Requirement, requirements())
        return {
            (one.name, str(one.specifier))
            for one in found
            if one.marker is None or one.marker.evaluate({"extra": extra})
        }

    installed = {extra: needed(extra) for extra in ("", "device", "simulation", "export")}
    assert ("pillow", "") not in installed[""]

    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert {extra: needed(extra) for extra in installed} == installed
    monkeypatch.setattr(installation, "__file__", "/nowhere/fedkn/installation.py")
    assert requirements() == []
