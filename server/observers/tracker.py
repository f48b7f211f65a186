"""What our trackers have in common: which numbers of a run they keep, and under which names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkn.observer import Event, Observer

__all__ = ["Tracker"]

_OF_A_ROUND = (
    *("train_loss", "learning_rate", "updates", "examples", "steps", "seconds"),
    *("train_seconds", "waiting_seconds", "bytes_down", "bytes_up"),
)
_OF_CLIENTS = ("mean", "worst_tenth", "deviation", "loss")


class Tracker(Observer):
    """Keeps the numbers of a run; a subclass says where.

    Their names: ``round/train_loss`` and other fields of a round, ``test/accuracy``,
    ``validation/loss`` and so on of an evaluation, ``clients/mean`` of the clients' own models. The
    step is the round. A number that is not finite is kept as NaN.

    Args:
        folder: of all runs' files; by default one of the tracker's name in the run folder.
    """

    name: str
    _status = "stopped"

    def __init__(self, folder: str = "") -> None:
        self._folder = folder

    @abstractmethod
    def open(self, folder: Path, event: Event) -> None:
        """Begin to keep a cell's numbers in `folder`; `event` is ``start`` or ``resume``."""

    @abstractmethod
    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keep the numbers of a round."""

    @abstractmethod
    def close(self, status: str) -> None:
        """End with `status`: completed, failed or stopped. Nothing may be open: it says nothing."""

    def run_begins(self, event: Event) -> None:
        """Open."""
        base = Path(self._folder) if self._folder else (event.folder or Path()) / self.name
        self.open(base.absolute(), event)

    def round_ends(self, event: Event) -> None:
        """Keep a round's numbers."""
        numbers = {f"round/{key}": event.fields.get(key) for key in _OF_A_ROUND}
        lost = {f"round/{key}": len(event[key]) for key in ("refused", "failed", "late")}
        self._record(event, numbers | lost)

    def evaluation(self, event: Event) -> None:
        """Keep the global model's metrics and its loss."""
        named = {f"{event['split']}/{key}": value for key, value in event["metrics"].items()}
        self._record(event, named | {f"{event['split']}/loss": event["loss"]})

    def client_evaluation(self, event: Event) -> None:
        """Keep the figures of the clients' own models."""
        self._record(event, {f"clients/{key}": event.fields.get(key) for key in _OF_CLIENTS})

    def cell_ends(self, event: Event) -> None:
        """Note how it ended."""
        self._status = event["status"]

    def run_ends(self, event: Event) -> None:
        """Close."""
        self.close(self._status)

    def _record(self, event: Event, numbers: Mapping[str, Any]) -> None:
        usable = (int, float)
        self.record(
            event["round"],
            {key: float(value) for key, value in numbers.items() if isinstance(value, usable)},
        )
