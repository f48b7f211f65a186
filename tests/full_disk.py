"""A disk that is full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["fill", "small_file_system"]


@contextmanager
def small_file_system(place: Path, size: str, *, lazily: bool = False) -> Iterator[None]:
    """Mount one of `size` at `place`, or skip the test where that is not allowed.

    It goes `lazily` where programs still have files open there.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "fedkn-test", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"may not mount a small file system: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", *(["--lazy"] if lazily else []), str(place)], check=True)


def fill(folder: Path) -> Path:
    """Write a file in `folder` until no byte more fits, and return it."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 512)
        except OSError:
            return filler
