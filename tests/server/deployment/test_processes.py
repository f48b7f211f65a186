"""Processes of a fleet that do not let themselves be looked into, as Flower's SuperExec."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from server.deployment.creation import create_fleet
from server.deployment.processes import main_processes, start, stop
from server.deployment.programs import Program, flower_environment

ROOT = Path(__file__).parents[3]

CLOSED = """
import ctypes, subprocess, sys, time
if len(sys.argv) > 2:
    subprocess.Popen([sys.executable, sys.argv[0], "a device's SuperExec"])
else:
    ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE
time.sleep(60)
"""

FLEET = """
import sys, time
from pathlib import Path
from server.deployment.creation import create_fleet
from server.deployment.processes import main_processes, running, start, stop
from server.deployment.programs import SUPEREXEC, Program, flower_environment

fleet = create_fleet(Path(sys.argv[1]) / "fleet", 1, "localhost", 18443)
settings, device = flower_environment(Path(sys.argv[1])), fleet.devices[0].name
command = (sys.executable, sys.argv[2])
start(fleet, Program(SUPEREXEC, (*command, str(fleet.superexec_secret)), settings))
start(fleet, Program(device, (*command, "a", "SuperNode"), settings))
try:
    time.sleep(2)
    (closed,) = [one for one in running(fleet) if one.name == SUPEREXEC]
    try:
        Path(f"/proc/{closed.pid}/environ").read_bytes()
        sys.exit("can be looked into")
    except PermissionError:
        pass
    assert main_processes(fleet).keys() == {SUPEREXEC, device}
    assert sorted(one.leader for one in running(fleet) if one.name == device) == [False, True]
finally:
    ended = stop(fleet)
assert ended == [device, SUPEREXEC]
assert not running(fleet)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a matter of /proc")
def test_a_users_superexec_is_found_and_ended(tmp_path):
    command = [sys.executable, "-c", FLEET, str(tmp_path), str(tmp_path / "closed.py")]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may look into everything, and there is no setpriv")
        command = ["setpriv", "--bounding-set", "-sys_ptrace,-perfmon,-sys_admin", *command]
    (tmp_path / "closed.py").write_text(CLOSED)
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_program_that_has_just_begun_is_there(tmp_path, monkeypatch):
    """Between exec and the end of its setup the kernel tells no environment of a process."""
    fleets = [create_fleet(tmp_path / name, 1, "localhost", 18443) for name in ("one", "two")]
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    settings = flower_environment(tmp_path)
    try:
        start(fleets[0], Program("device-0", command, settings))
        monkeypatch.setattr(psutil.Process, "environ", lambda process: {})
        assert main_processes(fleets[0]).keys() == {"device-0"}
        assert not main_processes(fleets[1])
    finally:
        monkeypatch.undo()
        assert stop(fleets[0]) == ["device-0"]
    assert not main_processes(fleets[0])
