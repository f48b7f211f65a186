"""The commands on machines that are not Linux, terminals that know ASCII alone, odd file names.

Every command is a process of its own, without the functions that only Linux has, without /proc and
/dev/shm, told that it runs on macOS, in the C locale.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clients.device.settings import read_device
from fedkn.config import ExperimentConfig
from fedkn.layers.native import library
from server.deployment.creation import create_fleet
from simulations.engines.run import run_experiment
from simulations.runs.folder import RunFolder
from tests.clients.device.test_check import EXPERIMENT, served

REPOSITORY = Path(__file__).parents[1]
# Latin-1, which no file system here takes for UTF-8.
ODD = os.fsdecode(b"caf\xe9 \xff")

SITE = '''
import builtins, io, os, resource, select, signal, socket, sys

# These look at the system when they are imported, and there is but the Linux build of them here.
import numpy, psutil, sysconfig, torch

sysconfig.get_config_vars()

def without(module, *names):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

without(os, *"""sched_getaffinity sched_setaffinity sched_setscheduler sched_getscheduler
    memfd_create MFD_CLOEXEC eventfd pidfd_open posix_fallocate posix_fadvise
    copy_file_range splice getrandom setns unshare pipe2 fdatasync getresuid
    getxattr setxattr listxattr sendfile""".split())
without(signal, *"""SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT sigtimedwait sigwaitinfo
    pidfd_send_signal""".split())
without(select, "epoll")
without(socket, *"""AF_NETLINK AF_PACKET AF_VSOCK SO_PEERCRED TCP_USER_TIMEOUT
    MSG_CMSG_CLOEXEC""".split())
without(resource, "prlimit")

def guarded(opener):
    def opened(file, *args, **kwargs):
        path = os.fspath(file) if not isinstance(file, int) else ""
        path = os.fsdecode(path)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if path.startswith(("/proc", "/dev/shm")) and not caller.startswith("psutil"):
            raise FileNotFoundError(2, "not on this machine", path)
        return opener(file, *args, **kwargs)
    return opened

builtins.open = guarded(builtins.open)
io.open = guarded(io.open)
os.open = guarded(os.open)
sys.platform = "darwin"
'''

# Commands one after the other, apart by ";": importing PyTorch takes longer than most of them. The
# preset of fedkn demo is another, made as small as its seven axes allow.
COMMANDS = """
import sys
from itertools import groupby
from pathlib import Path
from simulations.cli import main
from simulations.commands import demo

presets = Path(sys.argv[1])
demo.files = lambda package: presets.parent
for between, command in groupby(sys.argv[2:], ";".__eq__):
    if between:
        print("\\f", end="")
        continue
    try:
        main(list(command))
    except SystemExit as end:
        if end.code:
            raise
"""
SMALL = """
rounds = {rounds}
cohort = 2
[data]
source = "digits"
test_limit = 40
[partition]
clients = 3
[model]
width = 4
[train]
local_steps = 2
[compare]
normalizers = {normalizers}
batch_sizes = [2]
learning_rates = {rates}
search_rounds = 1
seeds = 1
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a process on the strange machine."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)]),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
        "OMP_NUM_THREADS": "1",
        "FEDKN_NATIVE": "0",
    }


def run(machine: dict[str, str], *arguments: str | Path) -> str:
    """Run ``python -m simulations`` there; return its standard output."""
    return python(machine, "-m", "simulations", *arguments)


def run_all(machine: dict[str, str], presets: Path, *arguments: str | Path) -> list[str]:
    """Run commands, apart by ";", in one process there; return the standard output of each."""
    return python(machine, "-c", COMMANDS, presets, *arguments).split("\f")


def python(machine: dict[str, str], *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        env=machine,
        check=False,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said.decode("ascii", "replace")
    assert b"Traceback" not in said, said.decode("ascii", "replace")
    return done.stdout.decode("ascii")


def test_the_machine_is_as_strange_as_it_says(machine: dict[str, str]) -> None:
    code = (
        "import os, sys, socket; assert sys.platform == 'darwin'; "
        "assert not hasattr(os, 'sched_getaffinity') and not hasattr(os, 'memfd_create'); "
        "assert sys.stdout.encoding == 'ascii' and sys.getfilesystemencoding() == 'ascii'; "
        "import pathlib; print(pathlib.Path('/proc/cpuinfo').exists())\n"
        "try: open('/proc/cpuinfo')\n"
        "except FileNotFoundError: print('gone')"
    )
    assert python(machine, "-c", code).split()[-1] == "gone"


def test_doctor(machine: dict[str, str], tmp_path: Path) -> None:
    findings, shown = run_all(machine, tmp_path, "doctor", "--json", ";", "doctor")
    found = {one["name"]: one["status"] for one in json.loads(findings)["findings"]}
    assert "fail" not in found.values()
    assert all(name in shown for name in found)


def test_demo_compare_resume_and_report(machine: dict[str, str], tmp_path: Path) -> None:
    presets = tmp_path / "presets"
    presets.mkdir()
    demo = SMALL.format(rounds=1, normalizers=["kernel"], rates=[0.03, 0.1])
    (presets / "demo.toml").write_text(demo)
    compared = SMALL.format(rounds=2, normalizers=["kernel", "batch"], rates=[0.1])
    (tmp_path / "compared.toml").write_text(compared)
    folder = tmp_path / ODD
    demo_shown, _ = run_all(
        machine,
        presets,
        *("demo", "--out", tmp_path / "demo", ";"),
        *("compare", tmp_path / "compared.toml", "--out", folder, "--workers", "2"),
    )
    assert "kernel" in demo_shown
    before = {cell.id: cell.weights_sha256 for cell in RunFolder.open(folder).cells()}
    assert before["kernel-b2-dirichlet0.3-s0"] is not None
    # As if killed before the last cell's end was written, and in its last round.
    cell = "batch-b2-dirichlet0.3-s0"
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not of_last_round(line, cell)]
    assert len(kept) < len(lines)
    (folder / "metrics.jsonl").write_text("".join(kept))
    (folder / "cells" / cell / "checkpoint-000002.safetensors").unlink()
    _, shown, summary = run_all(
        machine,
        presets,
        *("resume", folder, ";", "report", folder, ";", "report", folder, "--json"),
    )
    assert {one.id: one.weights_sha256 for one in RunFolder.open(folder).cells()} == before
    assert "batch" in shown
    assert json.loads(summary)["runs"]


def of_last_round(text: str, cell: str) -> bool:
    line = json.loads(text)
    return line["cell"] == cell and (line["kind"] == "end" or line.get("round") == 2)


EXPERIMENT_OF_MANY = {
    "rounds": 3,
    "cohort": 4,
    "partition.clients": 4,
    "model.width": 4,
    "train.local_steps": 10,
    "data.test_limit": 40,
    "engine": "inprocess",
    "device": "cpu",
}
# Workers are started at once, and what they are handed lies in a file.
CREW = """
import json, sys
from fedkn.config import ExperimentConfig
from simulations.engines import crew
from simulations.engines.run import run_experiment

started = []
start = crew.WorkerProcess.__init__
crew.WorkerProcess.__init__ = lambda *given: (started.append(1), start(*given))[1]
crew.PATIENCE = 0.0
config = ExperimentConfig.resolve(json.loads(sys.argv[1]), {"workers": 2})
print(json.dumps([run_experiment(config).weights_sha256, len(started)]))
"""


def test_one_experiment_in_several_processes(machine: dict[str, str]) -> None:
    strange = json.loads(python(machine, "-c", CREW, json.dumps(EXPERIMENT_OF_MANY)))
    with library.switched_off():  # as there
        config = ExperimentConfig.resolve(EXPERIMENT_OF_MANY, {"workers": 1})
        assert strange == [run_experiment(config).weights_sha256, 1]


def images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("cats", ODD)):
            (folder / split / name).mkdir(parents=True)
            for number in range(6):
                pixels = rng.integers(0, 100, (8, 8)) + 100 * label
                picture = Image.fromarray(pixels.astype(np.uint8))
                picture.save(folder / split / name / f"{ODD} {number}.png")
    return folder


def test_names_that_are_not_utf_8(machine: dict[str, str], tmp_path: Path) -> None:
    """A data folder, a class, pictures and the run folder: all in letters of another encoding."""
    data = images(tmp_path / f"{ODD} data")
    settings = ("--set=model.width=4", "--set=partition.minimum=1", "--set=train.local_steps=2")
    shape = ("--clients", "2", "--cohort", "2", "--rounds", "1")
    source = ("--source", "image_folder", "--root", str(data))
    folder = tmp_path / f"{ODD} run"
    picture = data / "test" / ODD / f"{ODD} 0.png"
    shown, predicted, table, _ = run_all(
        machine,
        tmp_path,
        *("run", *source, *shape, *settings, "--out", folder, ";"),
        *("predict", folder, picture, "--json", ";", "predict", folder, picture, ";"),
        *("report", folder),
    )
    assert "Report:" in shown
    (found,) = json.loads(predicted)["predictions"]
    assert found["class"]
    assert table


def test_device_check(machine: dict[str, str], tmp_path: Path) -> None:
    fleet = create_fleet(tmp_path / "fleet", 2, "localhost", 8443)
    config = fleet.devices[0].config
    with served(fleet) as port:
        text = config.read_text().replace(fleet.address, f"localhost:{port}")
        config.write_text(f"{text}{EXPERIMENT}")
        assert read_device(config.parent).port == port
        shown = run(machine, "device", "check", config.parent, "--json")
    findings = {one["name"]: one["status"] for one in json.loads(shown)["findings"]}
    assert {"server", "TLS", "threads", "key"} <= findings.keys()
    assert "fail" not in findings.values()
