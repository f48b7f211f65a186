"""Weights & Biases, offline: files that ``wandb sync RUN/wandb/offline-run-*`` uploads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from fedkn.observer import Event
from server.observers.tracker import Tracker

__all__ = ["WeightsAndBiases"]


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases for each cell, in the group of its run folder.

    Args:
        folder: see `Tracker`; Weights & Biases adds a folder ``wandb`` of its own.
        project: the project that the runs belong to.
        mode: ``offline`` sends nothing anywhere; ``online`` needs an account.
    """

    name = "wandb"
    _run: Any = None

    def __init__(
        self,
        folder: str = "",
        project: str = "fedkn",
        mode: Literal["offline", "online"] = "offline",
    ) -> None:
        super().__init__(folder)
        self._project = project
        self._mode = mode

    def open(self, folder: Path, event: Event) -> None:
        """Begin a run; a resumed cell has a second one, of the same name."""
        # Weights & Biases adds the last part, or, where there is no such folder, writes elsewhere.
        parent = folder if self._folder else folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            dir=parent,
            project=self._project,
            name=event.cell,
            group=event.folder.name if event.folder else None,
            config=event.config.flat(),
            mode=self._mode,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log numbers; those of a round's training and of its evaluation are one step."""
        self._run.log(dict(numbers), step=step)

    def close(self, status: str) -> None:
        """Finish the run, failed or not."""
        if self._run is not None:
            self._run.summary["status"] = status
            self._run.finish(exit_code=0 if status == "completed" else 1)
