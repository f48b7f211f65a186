"""The tests of the checkout that need a CUDA device, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import simulations
from fedkn.errors import UserError
from simulations.benchmarks.gpu.device import Gpu

__all__ = ["MarkedFile", "MarkedOutcome", "marked_files", "run_marked"]

_MARK = "pytest.mark.gpu"
_LIMIT = 85.0


@dataclass(frozen=True)
class MarkedFile:
    """A file with such tests, by its path in the checkout."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class MarkedOutcome:
    """How they ended: pytest's own last line, and whether none failed."""

    case: MarkedFile
    passed: bool
    summary: str


def marked_files() -> Iterator[MarkedFile]:
    """Yield the files of this checkout that have such tests; none where it has no tests."""
    folder = _checkout()
    for path in sorted((folder / "tests").rglob("test_*.py")):
        if _MARK in path.read_text(encoding="utf-8"):
            yield MarkedFile(path.relative_to(folder).as_posix())


def run_marked(case: MarkedFile, device: Gpu) -> MarkedOutcome:
    """Run the tests of the file. They use CUDA's first device, whatever `device` is.

    Raises:
        UserError: pytest could not run them.
    """
    device.clear()  # they share its memory
    # The checkout's own options may quieten pytest once more, and its last line would be gone.
    options = ["-o", "addopts=", "-v", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *options]
    try:
        done = subprocess.run(
            [*command, case.path],
            cwd=_checkout(),
            capture_output=True,
            text=True,
            timeout=_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return MarkedOutcome(case, passed=False, summary=_so_far(late.stdout))
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    summary = lines[-1].strip("= ") if lines else ""
    if done.returncode not in (0, 1):  # neither passed nor failed
        complaint = (done.stderr.strip().splitlines() or [summary])[-1]
        raise UserError(f"pytest cannot run {case.path}: {complaint}")
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return MarkedOutcome(case, done.returncode == 0, "; ".join((*failed, summary)))


def _so_far(output: bytes | str | None) -> str:
    """Return how the tests ended whose names pytest had printed when its time was over."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    lines = text.splitlines()
    passed = sum(" PASSED" in line for line in lines)
    failed = [line.split(" FAILED")[0] for line in lines if " FAILED" in line]
    named = "".join(f"FAILED {name}; " for name in failed)
    return f"{named}{passed} passed, then {_LIMIT:.0f} s were over"


def _checkout() -> Path:
    return Path(simulations.__file__).parents[1]
