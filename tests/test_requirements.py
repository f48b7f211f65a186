"""Containers install by hash what the tests run with; the actions of the CI are commits."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pinned(name: str) -> dict[str, tuple[str, list[str]]]:
    """Return version and hashes of every package in a requirements file."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        words = line.split("--hash=")
        requirement = Requirement(words[0])
        (version,) = requirement.specifier
        assert version.operator == "=="
        found[canonicalize_name(requirement.name)] = (version.version, words[1:])
    return found


@pytest.mark.parametrize(("name", "extra"), [("device", "device"), ("server", "simulation")])
def test_hashes_are_of_the_versions_that_were_tested(name, extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = pinned(f"requirements-{name}.txt")
    tested = {package: version for package, (version, _) in pinned("constraints.txt").items()}
    for package, (version, hashes) in packages.items():
        assert version == tested.get(package, version), package
        assert hashes, package
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", one) for one in hashes), package
    needed = [*project["dependencies"], *project["optional-dependencies"][extra]]
    for requirement in map(Requirement, needed):
        version, _ = packages[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_every_dependency_has_an_upper_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needed = [*project["dependencies"], *(one for extra in extras for one in extra)]
    for requirement in map(Requirement, needed):
        own = requirement.name == "fedkn"
        assert own or any(one.operator in ("<", "==") for one in requirement.specifier), requirement
    tested = pinned("constraints.txt")
    for requirement in map(Requirement, needed):
        name = canonicalize_name(requirement.name)
        if name in tested:
            assert requirement.specifier.contains(tested[name][0]), requirement


def test_the_cis_actions_are_named_by_commit():
    for path in (ROOT / ".github" / "workflows").iterdir():
        used = re.findall(r"uses: *(\S+)", path.read_text())
        assert used
        assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", one) for one in used), used
