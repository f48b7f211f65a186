"""Whole federated rounds on the device: training, messages, screening, aggregation."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkn import normalizers
from fedkn.experiment import federated_data
from simulations.benchmarks.engine_tasks import Task, prepared
from simulations.engines.choice import engine_of
from simulations.engines.run import run_experiment

__all__ = ["RoundCase", "RoundTime", "measure_rounds", "round_cases"]


@dataclass(frozen=True)
class RoundCase:
    """An experiment on images of noise, and how many rounds of it are run."""

    title: str
    task: Task


@dataclass(frozen=True)
class RoundTime:
    """What the middle one of the second half of the rounds took, and the whole run."""

    case: RoundCase
    engine: str
    round_seconds: float
    client_steps: int
    total_seconds: float


def round_cases(quick: bool) -> list[RoundCase]:
    """Return pfl-research's CIFAR-10 set-up by both engines, and every normalizer on ResNet-8."""
    pfl = {
        "cohort": 50,
        "train.batch_size": 10,
        "train.learning_rate": 0.1,
        "evaluation.every": 10,
    }
    rounds = 30 if quick else 60
    cases = [
        RoundCase(
            f"1,000 clients x 50, cohort 50, batch 10, three conv blocks, {engine}",
            Task("pfl", 1000, 50, rounds, {**pfl, "engine": engine}),
        )
        for engine in ("auto", "inprocess")
    ]
    resnet = {
        "cohort": 10,
        "model.name": "resnet8",
        "model.width": 16,
        "model.final_norm": "kernel",
        "train.batch_size": 2,
        "train.local_steps": 100,
    }
    names = ("kernel", "group", "batch", "none") if quick else normalizers.names()
    for name in names:
        # Some keep tensors on the clients, whose own models are then evaluated: alike for all.
        settings: Mapping[str, Any] = {
            **resnet,
            "normalizer.name": name,
            "evaluation.client_fraction": 0.2,
        }
        cases.append(
            RoundCase(f"ResNet-8 w16, cohort 10, {name}", Task("resnet8", 100, 200, 6, settings))
        )
    return cases


def measure_rounds(case: RoundCase, device: str) -> RoundTime:
    """Run the experiment on `device` and return what its rounds took."""
    with tempfile.TemporaryDirectory() as folder:
        config = prepared(case.task, Path(folder)).overlay(
            device=device,
            checkpoint__folder=str(Path(folder) / "run"),
            checkpoint__every=1_000_000,
        )
        federated_data(config)
        started = time.perf_counter()
        run_experiment(config)
        total = time.perf_counter() - started
        text = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    rounds = sorted(rounds[len(rounds) // 2 :], key=lambda line: float(line["seconds"]))
    middle = rounds[len(rounds) // 2]
    return RoundTime(case, engine_of(config), middle["seconds"], middle["steps"], total)
