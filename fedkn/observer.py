"""What watches a run on its server: it is told what happens, and changes nothing of it.

An observer is any object with some of the methods of `Observer`; it need not be a subclass. It is
named by `observers.names`: ours (``tensorboard``, ``mlflow``, ``wandb``), by reference
(``package.module:Class``), or as a package registered it (entry point ``fedkn.observers``), and
made once for each cell of a run, with those of `observers.options` that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedkn.config import ExperimentConfig

__all__ = ["Event", "Observer"]


@dataclass(frozen=True, eq=False)
class Event:
    """Something that happened in a run.

    Attributes:
        kind: that of its line in metrics.jsonl: ``start``, ``resume``, ``round``, ``evaluation``,
            ``client_evaluation``, ``end``.
        cell: the name of the experiment in its run folder.
        folder: the run folder, None where the run writes nothing.
        config: the experiment's settings.
        fields: those of the line (docs/run-folder.md), a copy of them.
    """

    kind: str
    cell: str
    folder: Path | None
    config: ExperimentConfig
    fields: Mapping[str, Any]
    _tensors: Callable[[], Mapping[str, np.ndarray]] = dict

    def __getitem__(self, name: str) -> Any:
        """Return a field: ``event["train_loss"]``."""
        return self.fields[name]

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the global tensors by name, copied; ask while the event is being told.

        They are those that a round has made, or that were evaluated; with other events there are
        none.
        """
        return {name: value.copy() for name, value in self._tensors().items()}


class Observer:
    """The calls that an observer may take. All of them do nothing.

    >>> class Printer(fedkn.Observer):
    ...     def round_ends(self, event):
    ...         print(event.cell, event["round"], event["train_loss"])
    """

    def run_begins(self, event: Event) -> None:
        """Be told of the beginning (kind ``start``) or of going on from a checkpoint (``resume``).

        After a resume come the events of rounds behind the checkpoint, which may have been told of
        before, by an observer in another process.
        """

    def round_ends(self, event: Event) -> None:
        """Be told of a round, whose updates have been aggregated."""

    def evaluation(self, event: Event) -> None:
        """Be told how good the global model is after a round; round 0 is the initial model."""

    def client_evaluation(self, event: Event) -> None:
        """Be told how good the clients' own models are, after the last round."""

    def cell_ends(self, event: Event) -> None:
        """Be told how it ended: its status, and its error or the hash of its weights."""

    def run_ends(self, event: Event) -> None:
        """Close what is open: the last call, also after a run that was stopped."""
