"""Observers that a user might write: one that writes down, one that meddles, some that fail."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch

from fedkn.observer import Event, Observer

__all__ = ["Exits", "FailsLate", "Lines", "Meddler", "NoObserver", "Unmade"]


class Lines:
    """Writes down every call; no subclass of anything."""

    def __init__(self, to: str = "", mark: str = "") -> None:
        self._to = Path(to)
        self._mark = mark

    def _write(self, call: str, event: Event) -> None:
        entry = {"call": call, "kind": event.kind, "cell": event.cell, "mark": self._mark}
        entry["tensors"] = sorted(event.tensors())
        with self._to.open("a") as file:
            file.write(json.dumps(entry | {"fields": dict(event.fields)}) + "\n")

    def run_begins(self, event: Event) -> None:
        self._write("run_begins", event)

    def round_ends(self, event: Event) -> None:
        self._write("round_ends", event)

    def evaluation(self, event: Event) -> None:
        self._write("evaluation", event)

    def client_evaluation(self, event: Event) -> None:
        self._write("client_evaluation", event)

    def cell_ends(self, event: Event) -> None:
        self._write("cell_ends", event)

    def run_ends(self, event: Event) -> None:
        self._write("run_ends", event)


class Meddler(Observer):
    """Does to global state, and to what it is given, whatever it can."""

    def __init__(self) -> None:
        self._meddle()

    def round_ends(self, event: Event) -> None:
        for value in event.tensors().values():
            value[...] = 7
        event["cohort"].clear()
        event["failed"].append({"client": 0, "reason": "made up"})
        self._meddle()

    def evaluation(self, event: Event) -> None:
        for value in event.tensors().values():
            value[...] = np.nan
        self._meddle()

    def _meddle(self) -> None:
        random.seed(99)
        random.random()
        np.random.seed(99)  # noqa: NPY002 - this is what others do
        np.random.rand()  # noqa: NPY002
        torch.manual_seed(99)
        torch.rand(3)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        torch.backends.mkldnn.enabled = False
        torch.backends.cudnn.benchmark = True
        np.seterr(all="raise")
        os.chdir("/")


class FailsLate(Observer):
    """Fails in every round."""

    def round_ends(self, event: Event) -> None:
        raise RuntimeError("the disk of\x1b[31m the tracker is full")


class Exits(Observer):
    """Ends the process."""

    def evaluation(self, event: Event) -> None:
        sys.exit(3)


class Unmade(Observer):
    """Cannot be made."""

    def __init__(self) -> None:
        torch.manual_seed(99)
        raise ConnectionError("nobody answers")


class NoObserver:
    """Has none of the methods."""
