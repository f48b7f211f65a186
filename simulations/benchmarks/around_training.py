"""What a round costs beside its training: processor time of all processes, and how long it takes.

``python -m simulations.benchmarks.around_training`` prints it for three set-ups, and followed by
cases for the largest set-up with each of them. A case is words joined by ``+``: the name of a
strategy, of a mechanism of clients' privacy or of a normalizer, ``momentum`` (each client keeps its
own), ``disk`` (as in a run with a folder, where clients keep what is their own in files), and
``workers`` (two processes in place of one). ``python -m ... scaffold scaffold+disk+workers``

Training is replaced by a change of the tensors, whose processor time is not counted. By the clock
it is, and so is that with workers a client's training is at rest for a while.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from fedkn.config import ExperimentConfig
from fedkn.normalizers import names as normalizer_names
from server import run as server_run
from server.rounds.loop import run_round
from simulations.benchmarks.engine_tasks import TASKS, Task, prepared
from simulations.benchmarks.idle_training import REST, idle_training
from simulations.engines import crew
from simulations.engines.run import run_experiment

__all__ = ["milliseconds"]

_PFL = {"cohort": 50, "train.batch_size": 10, "train.learning_rate": 0.1}
_LARGEST = Task("pfl-research's", 1000, 50, 12, _PFL)
_SETUPS = {
    "small": TASKS["small"],
    "fixed": TASKS["fixed"],
    "1,000 clients x 50, cohort 50, batch 10": _LARGEST,
}


class _Measured(BaseException):
    """The rounds are over: what a run does after its last is no part of this."""


def milliseconds(task: Task, engine: str, rounds: int, folder: Path) -> tuple[float, float]:
    """Return the processor time of a round without its training, and its time by the clock, in ms.

    Medians of the second half of so many `rounds`. The images are written into `folder` unless they
    are there.
    """
    marks: list[tuple[float, float, float]] = []

    def marked(*arguments: Any, **options: Any) -> Any:
        result = run_round(*arguments, **options)
        trained = sum(update.metrics["train-seconds"] for update in result[1].updates)
        marks.append((_processor_seconds(), trained, time.perf_counter()))
        if len(marks) == rounds:
            raise _Measured
        return result

    config = prepared(task, folder).overlay(rounds=rounds, engine=engine)
    with (
        tempfile.TemporaryDirectory(dir=folder) as run,
        idle_training(REST if config.workers > 1 else 0.0),
        patch.object(server_run, "run_round", marked),
        patch.object(crew, "PATIENCE", 0.0),
        patch.object(crew.Crew, "_start", _start_and_wait),
        suppress(_Measured),
    ):
        kept = {"checkpoint.folder": run} if config.checkpoint.folder else {}
        run_experiment(ExperimentConfig.resolve(config.flat(), kept))
    pairs = list(pairwise(marks[len(marks) // 2 :]))
    worked = statistics.median(now - before - trained for (before, *_), (now, trained, _) in pairs)
    return 1e3 * worked, 1e3 * statistics.median(now - before for (*_, before), (*_, now) in pairs)


def _start_and_wait(crew_: crew.Crew, place: int) -> None:
    """Start a worker, and wait until it is up: that takes more than many rounds do."""
    _START(crew_, place)
    while not all(worker.ready for worker in crew_._workers):
        crew_._collect(0.1)


_START = crew.Crew._start


def _processor_seconds() -> float:
    """Return the processor time of this process and those that it started, to the microsecond."""
    pids = [child.pid for child in psutil.Process().children(recursive=True)]
    # Linux's id of another process's clock.
    return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def _with(words: Iterable[str]) -> Task:
    """Return the largest set-up as the `words` of a case have it."""
    change: dict[str, Any] = {"workers": 1}
    for word in words:
        if word == "workers":
            change["workers"] = 2
        elif word == "disk":
            change["checkpoint.folder"] = "run"
        elif word == "momentum":
            change |= {"train.keep_momentum": True, "train.momentum": 0.9}
        elif word.startswith(("server_", "client_")):
            change["privacy.mechanism"] = word
        elif word in normalizer_names():
            change |= {"normalizer.name": word, "evaluation.client_fraction": 0.2}
        else:
            change["strategy.name"] = word
    return replace(_LARGEST, settings={**_PFL, **change})


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.WARNING)
    asked = {case: _with(case.split("+")) for case in sys.argv[1:]}
    with tempfile.TemporaryDirectory() as images:
        for title, setup in (asked or _SETUPS).items():
            one = replace(setup, settings={"workers": 1, **setup.settings})
            for name in ("inprocess",) if asked else ("inprocess", "batched"):
                worked, lasted = milliseconds(one, name, 16, Path(images))
                sys.stdout.write(
                    f"{title}, {name}: {worked:.1f} ms of processor time, {lasted:.0f} ms\n"
                )
                sys.stdout.flush()
