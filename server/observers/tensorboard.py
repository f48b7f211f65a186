"""TensorBoard: event files that ``tensorboard --logdir RUN/tensorboard`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tensorboard  # noqa: F401 - torch's own message does not name what is missing
from torch.utils.tensorboard import SummaryWriter

from fedkn.observer import Event
from server.observers.tracker import Tracker

__all__ = ["TensorBoard"]


class TensorBoard(Tracker):
    """Event files, a folder for each cell; its settings are the text ``settings``."""

    name = "tensorboard"
    _writer: SummaryWriter | None = None

    def open(self, folder: Path, event: Event) -> None:
        """Open an event file; after a resume, what was written beyond the checkpoint is void."""
        after = event["round"] + 1 if event.kind == "resume" else None
        self._writer = SummaryWriter(folder / event.cell, purge_step=after)
        settings = event.config.flat()
        text = "\n".join(f"    {key} = {value!r}" for key, value in settings.items())
        self._writer.add_text("settings", text)

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write scalars."""
        assert self._writer is not None
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: str) -> None:
        """Write the last, and close the file."""
        if self._writer is not None:
            self._writer.add_text("status", status)
            self._writer.close()
