"""The bundle of ``flwr build`` on devices with nothing but what ``fedkn[device]`` depends on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from fedkn.config import ExperimentConfig
from server.deployment import programs
from server.deployment.control import Control
from server.deployment.fleet import Device, Fleet
from server.deployment.ports import free_port
from server.deployment.processes import start, stop
from server.deployment.programs import Program
from server.deployment.startup import bring_up, wait_for_devices
from simulations.engines.run import run_experiment
from tests.deployment.fleets import SMALL, a_fleet, wait_for

ROOT = Path(__file__).parents[2]
# Names a Python to use instead of making one, which takes a minute and an index of packages.
VARIABLE = "FEDKN_BARE_PYTHON"
MUST_BE_MISSING = "fedkn clients torchvision matplotlib scipy sklearn ray opacus onnx pytest"
FIND = (
    f"import importlib.util as u; print([n for n in '{MUST_BE_MISSING}'.split() if u.find_spec(n)])"
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A Python with the dependencies of fedkn[device], and without fedkn."""
    if given := os.environ.get(VARIABLE):
        python = Path(given)
    else:
        folder = tmp_path_factory.mktemp("bare") / "venv"
        python = folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        needed = [*project["dependencies"], *project["optional-dependencies"]["device"]]
        install = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
        done = subprocess.run([*install, *needed], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(
                f"cannot install what a device needs, give {VARIABLE}: {done.stderr[-300:]}"
            )
    # What the tests' own Python finds elsewhere is not on a device.
    found = subprocess.run(
        [str(python), "-P", "-c", FIND],
        capture_output=True, text=True, check=True, cwd="/", env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert found.stdout.strip() == "[]"
    return python


def built(folder: Path) -> bytes:
    """Return the bundle that ``flwr build`` makes of the checkout."""
    flwr = Path(sys.executable).with_name("flwr")
    settings = programs.flower_environment(folder / "home")
    command = [str(flwr), "build", "--app", str(ROOT)]
    subprocess.run(command, cwd=folder, env=settings, check=True, stdout=subprocess.DEVNULL)
    (bundle,) = folder.glob("*.fab")
    return bundle.read_bytes()


def without_fedkn(fleet: Fleet, device: Device, python: Path) -> Program:
    """Return Flower's own SuperNode, of the bare Python, with a device's arguments."""
    usual = programs.supernode(fleet, device, fleet.superlink_address, free_port())
    options = usual.command[usual.command.index("--superlink") :]
    path = f"{python.parent}{os.pathsep}/usr/bin:/bin"
    settings = {**usual.environment, "PATH": path, "PYTHONPATH": ""}
    command = (str(python.with_name("flower-supernode")), *options)
    return replace(usual, command=command, environment=settings)


def with_fedkn(fleet: Fleet, device: Device, python: Path) -> Program:
    """Return ``fedkn device start``, of the bare Python and the checkout."""
    toml = device.config.read_text()
    device.config.write_text(toml.replace(fleet.address, fleet.superlink_address))
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = (str(python), "-P", "-c", "from simulations.cli import main; main()")
    return Program(device.name, (*command, "device", "start", str(device.folder)), settings)


def test_the_bundle_trains_where_only_a_devices_dependencies_are(bare, tmp_path):
    bundle = built(tmp_path)
    with a_fleet(tmp_path / "fleet", clients=2) as fleet, Control(fleet) as control:
        bring_up(fleet, local=True, say=lambda text: None)
        names = [device.name for device in fleet.devices]
        stop(fleet, names)
        for device, program in zip(fleet.devices, (without_fedkn, with_fedkn), strict=True):
            start(fleet, program(fleet, device, bare))
        wait_for_devices(control, 150, lambda text: None)
        results = fleet.runs / "bare"
        results.mkdir()
        size = {"rounds": 2, "partition.clients": 2, "cohort": 2}
        config = ExperimentConfig.resolve(SMALL, size, {"engine": "inprocess", "workers": 1})
        run_id = control.start(bundle, config.overlay(checkpoint__folder=str(results)).flat())
        # Each device compiles its kernels first: two minutes where the machine has much to do.
        wait_for(lambda: control.run(run_id).finished, 600)
        assert control.run(run_id).outcome == "completed", control.output(run_id)[-5:]
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    assert [line["updates"] for line in lines if line["kind"] == "round"] == [2, 2]
    (end,) = [line for line in lines if line["kind"] == "end"]
    assert end["weights_sha256"] == run_experiment(config).weights_sha256
