"""Fake cells on fake GPUs: `fake_cells` in a process whose ``torch`` knows of a GPU alone.

FAKE_GPUS is a folder with a file for every GPU, named as in CUDA_VISIBLE_DEVICES: its kind and its
memory. A cell takes there what its normalizer says in TAKES and notes when; beyond the memory it
runs out of it. Before its fourth round it waits until another cell has been there, if one is to
come. Imports no PyTorch, so that a worker starts at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from fedkn.config import ExperimentConfig
from tests.simulations import fake_cells

__all__ = ["TAKES", "run_cell"]

GIB = 2**30
TAKES = {"kernel": 1 * GIB, "layer": 6 * GIB, "rms": 30 * GIB}
"""Bytes that a cell reserves; one of `layer` twice that from its fourth round on."""

_reserved = 0


def _gpu() -> Path:
    return Path(os.environ["FAKE_GPUS"]) / os.environ["CUDA_VISIBLE_DEVICES"]


def _lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in _gpu().read_text().splitlines()]


def _properties(device: Any = None) -> SimpleNamespace:
    kind = _lines()[0]["kind"]
    return SimpleNamespace(name=kind, major=9, minor=0, multi_processor_count=132)


def _memory(device: Any = None) -> tuple[int, int]:
    total = _lines()[0]["memory"]
    return total, total


class OutOfMemoryError(RuntimeError):
    pass


torch = ModuleType("torch")
torch.OutOfMemoryError = OutOfMemoryError  # type: ignore[attr-defined]
torch.device = lambda name: SimpleNamespace(type="cuda", index=None)  # type: ignore[attr-defined]
torch.cuda = SimpleNamespace(  # type: ignore[attr-defined]
    is_available=lambda: _gpu().exists(),
    current_device=lambda: 0,
    mem_get_info=_memory,
    get_device_properties=_properties,
    max_memory_reserved=lambda device=None: _reserved,
    reset_peak_memory_stats=lambda device=None: None,
    empty_cache=lambda: None,
)
if __name__ != "__main__" and "torch" not in sys.modules:
    sys.modules["torch"] = torch


def run_cell(config: ExperimentConfig) -> None:
    """Run a fake cell that takes memory."""
    global _reserved  # noqa: PLW0603 - as PyTorch's allocator is one for the process
    _reserved = 0
    cell, name = config.checkpoint.cell, config.normalizer.name
    _note(cell, "begins", 0)
    write = fake_cells._write_round

    def write_round(log: Any, of: ExperimentConfig, round_: int) -> None:
        global _reserved  # noqa: PLW0603
        deadline = time.monotonic() + 60
        while round_ == 4 and len({line.get("cell", cell) for line in _lines()}) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        _reserved = TAKES[name] * (2 if name == "layer" and round_ > 3 else 1)
        _note(cell, "takes", _reserved)
        write(log, of, round_)

    fake_cells._write_round, misbehave = write_round, fake_cells._misbehave
    fake_cells._misbehave = lambda *args, **kwargs: None
    try:
        fake_cells.run_cell(config)
        time.sleep(0.6)  # longer than between two looks at the memory
    finally:
        fake_cells._write_round, fake_cells._misbehave = write, misbehave
        _note(cell, "ends", 0)


def _note(cell: str, what: str, bytes_: int) -> None:
    """Append a line to the GPU's file; raise where its cells now hold more than it has."""
    path = _gpu()
    with _locked(path) as file:
        lines = [json.loads(line) for line in file.read().splitlines()]
        held = {line["cell"]: line["bytes"] for line in lines[1:]} | {cell: bytes_}
        full = sum(held.values()) > lines[0]["memory"]
        noted = 0 if full else bytes_
        file.write(
            json.dumps({"cell": cell, "what": what, "bytes": noted, "at": time.time()}) + "\n"
        )
    if full:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
