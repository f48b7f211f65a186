"""What an experiment comes to does not depend on what ran it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkn import normalizers
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from simulations.engines import crew as crew_module
from simulations.engines.choice import engine_of
from simulations.engines.crew import Crew
from simulations.engines.outcome import Outcome
from simulations.engines.run import run_experiment


def _distance(one: Outcome, other: Outcome) -> float:
    """Return the distance of the weights in units of their own length."""
    assert one.arrays.keys() == other.arrays.keys()
    first, second = (
        np.concatenate([array.numpy().ravel() for array in outcome.arrays.values()])
        for outcome in (one, other)
    )
    return float(np.linalg.norm(first - second) / np.linalg.norm(first))


@pytest.fixture
def eager_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the workers after the first client, and wait for them, so that they get some too."""
    start = Crew._start

    def start_and_wait(crew: Crew, place: int) -> None:
        start(crew, place)
        while not all(worker.ready for worker in crew._workers):
            crew._collect(0.1)

    monkeypatch.setattr(crew_module, "PATIENCE", 0.0)
    monkeypatch.setattr(Crew, "_start", start_and_wait)


@pytest.mark.usefixtures("eager_workers")
@pytest.mark.parametrize("engine", ["inprocess", "batched"])
def test_any_number_of_processes_gives_the_same_bits(
    engine: str, experiment: ExperimentConfig
) -> None:
    config = experiment.overlay(engine=engine, rounds=4, train__local_epochs=3)
    hashes = {run_experiment(config.overlay(workers=n)).weights_sha256 for n in (1, 2)}
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "normalizer", [n for n in normalizers.names() if normalizers.create(n).together]
)
def test_batched_ends_in_the_weights_of_inprocess(
    normalizer: str, experiment: ExperimentConfig
) -> None:
    config = experiment.overlay(normalizer__name=normalizer, rounds=1)
    one, together = (run_experiment(config.overlay(engine=e)) for e in ("inprocess", "batched"))
    assert one.weights_sha256 != together.weights_sha256, "it cannot have trained together"
    # Rounding, blown up where a norm divides by the deviation of a nearly constant map.
    assert _distance(one, together) < 1e-3


def test_batched_refuses_what_cannot_train_together(experiment: ExperimentConfig) -> None:
    with pytest.raises(UserError, match=r"'batch'.*engine = 'inprocess'"):
        run_experiment(experiment.overlay(engine="batched", normalizer__name="batch"))


def test_auto_trains_together_on_a_gpu_alone(
    experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine_of(experiment) == "inprocess"
    assert engine_of(experiment.overlay(engine="ray")) == "ray"
    monkeypatch.setattr("simulations.engines.choice.device_of", lambda config: torch.device("cuda"))
    assert engine_of(experiment) == "batched"
    for change in (
        {"cohort": 2},
        {"privacy__mechanism": "example", "privacy__noise_multiplier": 1.0},
    ):
        assert engine_of(experiment.overlay(**change)) == "inprocess"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "bulyan"])
def test_ray_gives_the_same_bits_as_inprocess(strategy: str, experiment: ExperimentConfig) -> None:
    pytest.importorskip("ray")
    config = experiment.overlay(workers=2, strategy__name=strategy)
    one, other = (run_experiment(config.overlay(engine=e)) for e in ("inprocess", "ray"))
    assert one.weights_sha256 == other.weights_sha256


@pytest.mark.parametrize("engine", ["inprocess", "batched"])
def test_killed_and_resumed_gives_the_same_bits(
    engine: str, experiment: ExperimentConfig, tmp_path: Path
) -> None:
    config = experiment.overlay(engine=engine, rounds=12)
    whole = run_experiment(config).weights_sha256
    broken = config.overlay(checkpoint__folder=str(tmp_path))
    program = (
        "import sys, json; from fedkn.config import ExperimentConfig as E;"
        "from simulations.engines.run import run_experiment;"
        "run_experiment(E.resolve(json.loads(sys.argv[1])))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, json.dumps(broken.flat())])
    cell = tmp_path / "cells" / "experiment"
    while process.poll() is None and not list(cell.glob("checkpoint-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cell / "checkpoint-000012.safetensors").exists(), "killed too late to show anything"
    # In another number of processes than it was begun with.
    assert run_experiment(broken.overlay(workers=2)).weights_sha256 == whole


def test_every_example_is_trained_on_and_counted(
    experiment: ExperimentConfig, tmp_path: Path
) -> None:
    for engine in ("inprocess", "batched"):
        folder = tmp_path / engine
        folder.mkdir()
        run_experiment(
            experiment.overlay(
                engine=engine, cohort=8, train__local_epochs=2, checkpoint__folder=str(folder)
            )
        )
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        rounds = [line for line in lines if line["kind"] == "round"]
        # All eight clients: the training images less the validation part, twice over.
        assert [(r["examples"], r["skipped_examples"]) for r in rounds] == [(272, 0), (272, 0)]
