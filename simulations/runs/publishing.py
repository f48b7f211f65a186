"""What of a run folder can be kept in a repository: its numbers, and nothing of the machine.

Without checkpoints and data, and with the paths of the machine taken out, so that a report can be
built from it anywhere, and a resume goes on from it where the data are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedkn.errors import UserError
from fedkn.files import write_atomically
from simulations.runs.folder import RunFolder, write_json

__all__ = ["KEPT", "publish"]

KEPT = ("experiment.json", "grid.json", "environment.json", "data.json", "partition.json")
"""Copied; metrics.jsonl comes last, with the lines of cells that have ended."""

_PLACES = ("data.root", "root", "checkpoint.folder")
"""Settings that say where something lies on the machine: emptied."""
_PATH = re.compile(r"(?<![\w:/.~])~?(?:/[^\s'\"/]+){2,}/?")
"""A whole path in a command or a message."""


def publish(run: RunFolder, folder: Path) -> Path:
    """Copy what is to be kept of `run` into ``folder/NAME``, and return that.

    A copy that is there already is brought up to date. Cells that have not ended are left out: a
    resume begins them anew.

    Raises:
        UserError: `run` lies there itself, another run does, a file cannot be read or written.
    """
    target = folder / run.path.resolve().name
    if target.resolve() == run.path.resolve():
        raise UserError(f"'{run.path}' lies in '{folder}' already: nothing was copied")
    if not RunFolder.may_begin(target) and not _of_one(RunFolder.open(target), run):
        raise UserError(f"'{target}' holds another run: give another folder")
    ended = {cell.id for cell in run.cells() if cell.status != "unfinished"}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (run.path / name).exists():
                write_json(target / name, _without_paths(run.read(name)))
        lines = "".join(f"{line}\n" for line in _lines(run, ended))
        write_atomically(target / "metrics.jsonl", lines.encode())
    except OSError as error:
        raise UserError(f"cannot write in '{target}': {error.strerror or error}") from None
    return target


_GROWS = ("compare.normalizers", "compare.batch_sizes")
_FREE = ("compare.seeds", "compare.workers")


def _of_one(copy: RunFolder, run: RunFolder) -> bool:
    """Whether `copy` is of an earlier state of `run`: fewer seeds, normalizers or batch sizes.

    A setting that the fedkn of the copy did not know yet may have come since.
    """
    then, now = (_without_paths(of.read("grid.json", missing={})) for of in (copy, run))
    return set(then) <= set(now) and all(
        set(value) <= set(now[key]) if key in _GROWS else now[key] == value
        for key, value in then.items()
        if key not in _FREE
    )


def _lines(run: RunFolder, ended: set[str]) -> Iterator[str]:
    for line in run.tail().poll():
        if line["cell"] in ended:
            yield json.dumps(_without_paths(line), allow_nan=False)


def _without_paths(value: Any) -> Any:
    """The same, without what names a place on this machine."""
    if isinstance(value, dict):
        return {
            key: "" if key in _PLACES else _without_paths(entry) for key, entry in value.items()
        }
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    return _PATH.sub("PATH", value) if isinstance(value, str) else value
