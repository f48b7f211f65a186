"""A stand-in for the engine: cells that cost nothing, resume as real ones do, or misbehave.

Accuracy depends on the learning rate alone (best at 0.1) and the hash on every round's input, so
that a round lost or done twice shows. Imports little, so that a worker starts at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from pathlib import Path

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError
from server.metrics_log import MetricsLog

__all__ = ["run_cell"]

BEST_RATE = 0.1


def run_cell(config: ExperimentConfig) -> None:
    """Run a cell. The normalizer says how it behaves; train.momentum is the seconds of a round."""
    folder = Path(config.checkpoint.folder) / "cells" / config.checkpoint.cell
    folder.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(config.checkpoint.folder, config.checkpoint.cell)
    state = folder / "checkpoint-fake"
    done, digest = json.loads(state.read_text()) if state.exists() else (0, "")
    if state.exists():
        log.write("resume", round=done, time=0.0)
    else:
        purpose = "search" if config.evaluation.split == "validation" else "result"
        log.write("start", time=0.0, purpose=purpose, config=config.flat())
    for round_ in range(done + 1, config.rounds + 1):
        _misbehave(config, round_, resumed=done > 0)
        time.sleep(config.train.momentum)
        text = f"{digest} {round_} {config.seed} {config.train.learning_rate}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        _write_round(log, config, round_)
        part = state.with_suffix(".part")
        part.write_text(json.dumps([round_, digest]))
        part.replace(state)
    log.write("end", status="completed", seconds=0.0, weights_sha256=digest)


def _misbehave(config: ExperimentConfig, round_: int, *, resumed: bool) -> None:
    if config.evaluation.split == "validation" or round_ < 2:
        return
    match config.normalizer.name:
        case "none":
            raise FedknError("no valid update\nin the last round")
        case "instance":
            raise ZeroDivisionError("a bug")
        case "layer" if not resumed:
            os.kill(os.getpid(), signal.SIGKILL)
        case "group":
            os.kill(os.getpid(), signal.SIGSEGV)


def _write_round(log: MetricsLog, config: ExperimentConfig, round_: int) -> None:
    log.write(
        "round",
        round=round_,
        seconds=max(config.train.momentum, 0.001),
        cohort=[0],
        updates=1,
        examples=1,
        steps=1,
        skipped_batches=0,
        skipped_examples=0,
        refused=[],
        failed=[],
        train_loss=1.0,
        bytes_down=1,
        bytes_up=1,
        train_seconds=0.1,
        learning_rate=config.train.learning_rate,
    )
    distance = abs(math.log10(config.train.learning_rate / BEST_RATE))
    log.write(
        "evaluation",
        round=round_,
        split=config.evaluation.split,
        metrics={"accuracy": 1 / (1 + distance)},
        loss=distance,
        examples=10,
    )
