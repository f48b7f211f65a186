"""One writer of a folder, whoever it is and however it ends."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedkn import locks
from fedkn.errors import UserError
from fedkn.locks import HELD, held

HOLDER = """
import sys, time
from pathlib import Path
from fedkn.locks import held
with held(Path(sys.argv[1]), "ask Ada"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds `tmp_path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_who_holds_it_and_what_to_do(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE_SECONDS", 0.2)
    with pytest.raises(UserError) as refused, held(tmp_path):
        pytest.fail("two hold it")
    text = str(refused.value)
    assert f"pid {holder.pid} on {platform.node()}" in text
    assert text.endswith("ask Ada")


def test_it_is_free_once_the_holder_is_killed(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    with held(tmp_path):
        assert f"pid {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_who_is_on_its_way_out_is_waited_for(tmp_path, holder):
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    started = time.monotonic()
    with held(tmp_path):
        assert time.monotonic() - started > 0.5


def test_a_worker_writes_under_its_parents_lock(tmp_path, holder, monkeypatch):
    monkeypatch.setenv(HELD, str(tmp_path))
    with held(tmp_path) as descriptor:
        assert descriptor is None
    monkeypatch.setattr(locks, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setenv(HELD, str(tmp_path / "another"))
    with pytest.raises(UserError, match="another process"), held(tmp_path):
        pass


def test_what_a_lock_file_says_is_shown_as_text(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE_SECONDS", 0.2)
    (tmp_path / ".lock").write_bytes(b"\x1b[31mpid\xff\nrm -rf\r\n" + b"x" * 9000)
    with pytest.raises(UserError) as refused, held(tmp_path):
        pass
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 900
