"""One contender of the engines' benchmark, in a process of its own.

``python -m simulations.benchmarks.contender KIND CONFIG.json`` prints a JSON line after every
round: the clock, the CPU seconds and the memory of the process and its children.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

import psutil

from fedkn.config import ExperimentConfig

__all__ = ["main", "report_round"]


def report_round() -> None:
    """Print the line of a round that has just ended."""
    own = psutil.Process()
    family = [own, *own.children(recursive=True)]
    cpu = memory = 0.0
    for process in family:
        try:
            times = process.cpu_times()
            cpu += times.user + times.system
            memory += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    line = {
        "time": time.monotonic(),
        "cpu": cpu,
        "own_memory": own.memory_info().rss,
        "memory": memory,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


class _RoundsLogged(logging.Handler):
    """Listens to the ServerApp's own log: it says when a round has ended."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("round ") and "updates" in record.getMessage():
            report_round()


def main(kind: str, path: str) -> None:
    """Run the contender `kind`: an engine's name, ``loop-N`` or ``pfl``."""
    config = ExperimentConfig.resolve(json.loads(Path(path).read_text(encoding="utf-8")))
    if kind.startswith("loop"):
        from simulations.benchmarks.loop import run_loop  # noqa: PLC0415 - only the one in use

        run_loop(config, int(kind.partition("-")[2]), report_round)
    elif kind == "pfl":
        from simulations.benchmarks.pfl_rival import run_pfl  # noqa: PLC0415 - as above

        run_pfl(config, report_round)
    else:
        from simulations.engines.run import run_experiment  # noqa: PLC0415 - as above

        logger = logging.getLogger("flwr")
        logger.handlers.clear()
        logger.addHandler(_RoundsLogged())
        logger.setLevel(logging.INFO)
        run_experiment(config.overlay(engine=kind))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], sys.argv[2])
