"""Whole federated rounds on the device: training, messages, screening, aggregation, evaluation."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkn import normalizers
from fedkn.experiment import federated_data
from simulations.benchmarks.engine_tasks import Task, prepared
from simulations.benchmarks.gpu.device import Gpu
from simulations.engines.choice import engine_of
from simulations.engines.run import run_experiment

__all__ = ["RoundCase", "RoundTime", "measure_rounds", "round_cases"]


@dataclass(frozen=True)
class RoundCase:
    """An experiment on images of noise, and how many rounds of it are run."""

    title: str
    task: Task

    def __str__(self) -> str:
        return self.title


@dataclass(frozen=True)
class RoundTime:
    """What the second half of the rounds took.

    Attributes:
        round_seconds: of the middle one by its own account: training, screening, aggregation.
        wall_seconds: of each on average by the clock, evaluations included.
        total_seconds: of the whole run, its beginning and end included.
    """

    case: RoundCase
    engine: str
    round_seconds: float
    wall_seconds: float
    client_steps: int
    total_seconds: float


def round_cases() -> list[RoundCase]:
    """Return pfl-research's CIFAR-10 set-up, and every normalizer on ResNet-8."""
    pfl = {
        "cohort": 50,
        "train.batch_size": 10,
        "train.learning_rate": 0.1,
        "evaluation.every": 10,
    }
    first, second = (
        RoundCase(
            f"1,000 clients x 50, cohort 50, batch 10, three conv blocks, {engine}",
            Task("pfl", 1000, 50, 40, {**pfl, "engine": engine}, test_images=10_000),
        )
        for engine in ("auto", "inprocess")
    )
    resnet = {
        "cohort": 10,
        "model.name": "resnet8",
        "model.width": 16,
        "model.final_norm": "kernel",
        "train.batch_size": 2,
        "train.local_steps": 100,
    }
    names = ("kernel", "group", "batch", "none")
    every = dict.fromkeys((*names, *normalizers.names()))
    cases = []
    for name in every:
        # Some keep tensors on the clients, whose own models are then evaluated: alike for all.
        settings: Mapping[str, Any] = {
            **resnet,
            "normalizer.name": name,
            "evaluation.client_fraction": 0.2,
        }
        cases.append(
            RoundCase(f"ResNet-8 w16, cohort 10, {name}", Task("resnet8", 100, 200, 5, settings))
        )
    return [first, *cases, second]


def measure_rounds(case: RoundCase, device: Gpu) -> RoundTime:
    """Run the experiment on `device` and return what its rounds took."""
    with tempfile.TemporaryDirectory() as folder:
        config = prepared(case.task, Path(folder)).overlay(
            device=device.name,
            checkpoint__folder=str(Path(folder) / "run"),
            checkpoint__every=1_000_000,
        )
        federated_data(config)
        started = time.perf_counter()
        with _ends_of_rounds() as ends:
            run_experiment(config)
        total = time.perf_counter() - started
        text = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    if lost := [line for line in rounds if line["failed"] or line["refused"]]:
        raise RuntimeError(f"clients failed in round {lost[0]['round']}: {lost[0]['failed'][:1]}")
    half = len(rounds) // 2
    wall = (ends[-1] - ends[half - 1]) / (len(ends) - half)
    late = sorted(rounds[half:], key=lambda line: float(line["seconds"]))
    middle = late[len(late) // 2]
    return RoundTime(case, engine_of(config), middle["seconds"], wall, middle["steps"], total)


@contextmanager
def _ends_of_rounds() -> Iterator[list[float]]:
    """Yield a list of the moments in which rounds ended, by the ServerApp's own log."""
    ends: list[float] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith("round ") and "updates" in text:
                ends.append(time.perf_counter())

    logger, listener = logging.getLogger("flwr"), Listener()
    before, others = logger.level, logger.handlers[:]
    logger.handlers = [listener]
    logger.setLevel(logging.INFO)
    try:
        yield ends
    finally:
        logger.handlers = others
        logger.setLevel(before)
