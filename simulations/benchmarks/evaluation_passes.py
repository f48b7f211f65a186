"""What evaluation costs in a run, and what a recorded forward pass would save of it.

``python -m simulations.benchmarks.evaluation_passes``: processor time, one process, no workers.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from clients import app
from fedkn import models, normalizers
from fedkn.config import ExperimentConfig
from fedkn.layers.native import library
from fedkn.training import Inputs
from fedkn.training.operations import Operations, Reading, Telling
from server import global_model, run
from simulations.benchmarks.engine_tasks import TASKS, prepared
from simulations.engines.run import run_experiment

__all__ = ["pass_microseconds", "run_seconds"]

_ROUNDS = 12
_TURNS = 60
_PASSES = [
    ("convnet3", 8, 32, 10),
    ("convnet3", 8, 32, 50),
    ("convnet3", 8, 32, 256),
    ("resnet8", 8, 8, 20),
    ("resnet8", 8, 8, 256),
    ("resnet8", 64, 8, 256),
]


def run_seconds(config: ExperimentConfig) -> Mapping[str, float]:
    """Return the processor seconds of a run's rounds, the server's evaluations, the clients'."""
    spent: dict[str, float] = {}

    def timed(of: object, name: str, what: str) -> Any:
        call: Callable[..., Any] = getattr(of, name)

        def timing(*args: object, **kwargs: object) -> Any:
            begun = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent[what] = spent.get(what, 0.0) + time.process_time() - begun

        return patch.object(of, name, timing)

    with (
        timed(run, "run_round", "rounds"),
        timed(global_model, "evaluate", "server"),
        timed(app, "evaluate", "clients"),
    ):
        run_experiment(config)
    return spent


def pass_microseconds(network: str, width: int, side: int, size: int) -> tuple[float, float]:
    """Return how long a forward pass with GroupNorm takes: as it comes, and recorded; the least."""
    normalizer = normalizers.create("group")
    model = models.build(
        network, num_classes=10, in_channels=3, normalizer=normalizer, width=width, seed=0
    ).eval()
    images = torch.randint(256, (size, 3, side, side), dtype=torch.uint8)
    x = Inputs("unit", memory_format=normalizer.memory_format)(images)
    with torch.inference_mode():
        outputs = model(x).clone()
        operations = Operations([x], Telling({}, 0.0))
        with library.recording(), Reading(), operations:
            outputs.copy_(model(x))
        step = operations.finished([])
        outputs.zero_()
    targets = torch.zeros(size)
    least = [float("inf")] * 2
    for _ in range(_TURNS):
        begun = time.perf_counter()
        with torch.inference_mode():
            expected = model(x)
        between = time.perf_counter()
        step.take(x, targets, [size], [], [], 0.0)
        ended = time.perf_counter()
        least = [min(least[0], between - begun), min(least[1], ended - between)]
    assert torch.equal(outputs, expected)
    return 1e6 * least[0], 1e6 * least[1]


def _main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    evaluating: dict[str, str | int] = {
        "rounds": _ROUNDS,
        "workers": 1,
        "device": "cpu",
        "evaluation.every": 1,
    }
    digits = ExperimentConfig.resolve(evaluating | {"normalizer.name": "group"})
    out = sys.stdout.write
    out("| run | rounds, s | the server's evaluations, s | the clients', s |\n|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        held = {"evaluation.client_fraction": 0.2}
        small = prepared(TASKS["small"], Path(folder)).overlay(**evaluating, **held)
        for name, config in (("small", small), ("digits", digits)):
            spent = run_seconds(config.overlay(engine="inprocess"))
            clients = spent.get("clients", 0.0)
            out(f"| {name} | {spent['rounds']:.2f} | {spent['server']:.2f} | {clients:.2f} |\n")
    out("\n| network, width, side, images | as it comes, us | recorded, us | ratio |\n")
    out("|---|---|---|---|\n")
    for network, width, side, size in _PASSES:
        one, other = pass_microseconds(network, width, side, size)
        title = f"{network}, {width}, {side}, {size}"
        out(f"| {title} | {one:.0f} | {other:.0f} | {other / one:.2f} |\n")


if __name__ == "__main__":
    _main()
