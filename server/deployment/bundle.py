"""The Flower app bundle: the code that the server and every device run, from what is installed.

Made from the imported packages, so that an installed wheel deploys as a checkout does.
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from io import BytesIO
from pathlib import Path

from flwr.cli.build import build_fab_from_files

from fedkn import __version__
from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError, UserError
from server.deployment.own_code import NOTHING, OwnCode

__all__ = ["build_bundle"]

PACKAGES = ("fedkn", "clients", "server")
# What starts the fleet is not part of what runs in it.
_LEFT_OUT = ("server/deployment/",)


def build_bundle(own: OwnCode = NOTHING) -> bytes:
    """Return the bundle: fedkn, clients and server, and every configuration key's default.

    With the user's `own` code, which every device then runs.

    Raises:
        UserError: Flower leaves a file of the user's out, or all of it is too large.
        FedknError: Flower refuses ours, which is a fault of this installation.
    """
    files: dict[str, bytes | Path] = {"pyproject.toml": _project().encode()}
    for package in PACKAGES:
        folder = _folder(package)
        for path in sorted(folder.rglob("*.py")):
            name = f"{package}/{path.relative_to(folder).as_posix()}"
            if not name.startswith(_LEFT_OUT):
                files[name] = path
    files |= own.files
    try:
        bundle = build_fab_from_files(files)[0]
    except ValueError as error:
        kind = UserError if own.files else FedknError
        raise kind(f"Flower does not take the code as an app: {error}") from None
    with zipfile.ZipFile(BytesIO(bundle)) as taken:
        missing = sorted(own.files.keys() - set(taken.namelist()))
    if missing:
        raise UserError(
            f"Flower leaves '{missing[0]}' out of its bundle (names such as test_….py, and folders "
            "such as build and lib): give the module another name"
        )
    return bundle


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FedknError(f"package '{package}' is not installed: install fedkn again")
    return Path(spec.submodule_search_locations[0])


def _project() -> str:
    # partition.clients = 0 takes every SuperNode, as in pyproject.toml.
    defaults = {**ExperimentConfig().flat(), "partition.clients": 0}
    lines = [f"{key} = {json.dumps(value)}" for key, value in defaults.items()]
    return "\n".join(
        [
            "[project]",
            'name = "fedkn"',
            f'version = "{__version__}"',
            'description = "Federated, small-batch training"',
            'license = "Apache-2.0"',
            "dependencies = []",
            "[tool.flwr.app]",
            'publisher = "fedkn"',
            "[tool.flwr.app.components]",
            'serverapp = "server.app:app"',
            'clientapp = "clients.app:app"',
            "[tool.flwr.app.config]",
            *lines,
            "",
        ]
    )
