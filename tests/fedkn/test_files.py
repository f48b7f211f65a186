"""Files written whole, and when the disk is waited for."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedkn.files import make_durable, write_atomically


def test_many_files_are_written_without_waiting_and_then_waited_for_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(os, "fsync", waited.append)
    for name in ("a", "b"):
        write_atomically(tmp_path / name, name.encode(), durable=False)
        assert (tmp_path / name).read_bytes() == name.encode()
    assert not waited
    make_durable(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    write_atomically(tmp_path / "a", b"new")
    # The file, and the folder that names it.
    assert len(waited) == 2


def test_where_one_file_system_cannot_be_waited_for_all_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name, **options: SimpleNamespace())
    monkeypatch.setattr(os, "sync", lambda: called.append(True))
    make_durable(tmp_path)
    assert called


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        make_durable(tmp_path / "gone")


def test_a_disk_that_failed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def syncfs(descriptor: int) -> int:
        ctypes.set_errno(5)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda name, **options: SimpleNamespace(syncfs=syncfs))
    with pytest.raises(OSError, match="Input/output error"):
        make_durable(tmp_path)
