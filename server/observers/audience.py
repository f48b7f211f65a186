"""Whom a server tells what happens: metrics.jsonl, Flower's log, and the user's observers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fedkn.config import ExperimentConfig
from fedkn.observer import Event
from fedkn.text import printable
from server.metrics_log import MetricsLog
from server.observers.log_lines import LogLines
from server.observers.untouched import untouched

__all__ = ["Audience"]

_LOG = logging.getLogger("flwr")

_CALLS = {
    "start": "run_begins",
    "resume": "run_begins",
    "round": "round_ends",
    "evaluation": "evaluation",
    "client_evaluation": "client_evaluation",
    "end": "cell_ends",
}
"""By the kind of a line what an observer is called."""


class Audience:
    """Tells everybody, metrics.jsonl first.

    The log is the one observer without which a run cannot go on. Another that fails is named in a
    warning, and told nothing more. Observers see copies, and whatever they do to global state is
    undone, so that none can change a bit of the result.

    Attributes:
        begun: whether a line said that the run begins, or goes on.
    """

    def __init__(
        self, config: ExperimentConfig, log: MetricsLog, observers: Sequence[tuple[str, object]]
    ) -> None:
        self._config = config
        self._log = log
        self._observers = list(observers)
        self.begun = False

    def write(
        self, kind: str, state: Mapping[str, np.ndarray] | None = None, /, **fields: Any
    ) -> None:
        """Write a line of `kind` to the log, and tell the observers if it is one of theirs.

        `state`: the global tensors, which are not written.

        Raises:
            LogNotWritten: the log cannot be written.
        """
        self._log.write(kind, **fields)
        self.begun = self.begun or kind in ("start", "resume")
        if kind in _CALLS:
            self._tell(_CALLS[kind], kind, state or {}, fields)

    def close(self) -> None:
        """Tell the observers that this was all."""
        self._tell("run_ends", "run_ends", {}, {})

    def _tell(
        self, call: str, kind: str, tensors: Mapping[str, np.ndarray], fields: Mapping[str, Any]
    ) -> None:
        checkpoint = self._config.checkpoint
        for entry in list(self._observers):
            name, observer = entry
            if (method := getattr(observer, call, None)) is None:
                continue
            event = Event(
                kind=kind,
                cell=checkpoint.cell,
                folder=Path(checkpoint.folder).absolute() if checkpoint.folder else None,
                config=self._config,
                fields=MappingProxyType(deepcopy(dict(fields))),
                _tensors=lambda: tensors,
            )
            try:
                # Ours draws nothing and sets nothing, and is told of every round.
                with nullcontext() if isinstance(observer, LogLines) else untouched():
                    method(event)
            # Also of an observer that would end the process: sys.exit.
            except (Exception, SystemExit) as error:
                self._observers.remove(entry)
                self._warn(name, call, error)

    def _warn(self, name: str, call: str, error: BaseException) -> None:
        text = (
            f"observer '{printable(name, 120)}' failed in {call} "
            f"({type(error).__name__}: {printable(error, 200)}): the run goes on, and it is told "
            "nothing more"
        )
        _LOG.warning("%s", text)
        self._log.write("warning", text=text)
