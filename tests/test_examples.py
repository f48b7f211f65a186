"""The examples run as they stand, and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedkn
from server.checkpoints import weights_sha256

EXAMPLES = Path(__file__).parents[1] / "examples"


def ran(name: str, folder: Path) -> tuple[str, fedkn.Result]:
    """Run an example in `folder`; return what it printed and its run."""
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    result = fedkn.load(run)
    assert result.failed == 0
    assert set(result.cells.status) == {"completed"}
    return done.stdout, result


def test_every_example_is_listed_and_run_here() -> None:
    files = {path.name for path in EXAMPLES.glob("*.py")}
    listed = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    assert files == listed
    here = Path(__file__).read_text()
    assert all(f'ran("{name}"' in here for name in files)


def test_own_observer(tmp_path: Path) -> None:
    printed, result = ran("own_observer.py", tmp_path)
    rows = [line.split(",") for line in (result.folder / "moved.csv").read_text().splitlines()]
    (cell,) = result.cells.cell
    assert [(name, int(round_)) for name, round_, _ in rows] == [(cell, n) for n in (1, 2, 3)]
    assert all(row[2] in printed for row in rows)
    # The last movement, from the checkpoints that are kept: those of the last two rounds.
    from server.checkpoints import _read

    before, after = (
        _read(path)[0] for path in sorted((result.folder / "cells" / cell).glob("checkpoint-*"))
    )
    moved = [after.tensors[name].ravel() - before.tensors[name].ravel() for name in after.tensors]
    assert float(rows[-1][2]) == pytest.approx(np.linalg.norm(np.concatenate(moved)), rel=1e-6)
    network = result.model(cell)
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    assert weights_sha256(state) == weights_sha256(after.tensors)
