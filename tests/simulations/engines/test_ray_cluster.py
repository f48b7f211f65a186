"""Clients on the machines of a Ray cluster: two raylets on this one."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from simulations.engines.run import run_experiment
from tests.simulations.engines.ray_cluster import SETTINGS

pytest.importorskip("ray")
MARK = "FEDKN_TEST_CLUSTER"


@pytest.fixture
def marked() -> Iterator[dict[str, str]]:
    """Return an environment; whatever was started in it is gone afterwards."""
    mark = uuid.uuid4().hex
    before = {process.pid for process in psutil.process_iter()}
    yield {**os.environ, MARK: mark}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid not in before and process.environ().get(MARK) == mark:
                process.kill()


@pytest.mark.slow
def test_two_nodes_give_the_bits_of_one_machine(tmp_path: Path, marked: dict[str, str]) -> None:
    program = [sys.executable, "-m", "tests.simulations.engines.ray_cluster", str(tmp_path)]
    done = subprocess.run(
        program, env=marked, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    one = run_experiment(ExperimentConfig.resolve(SETTINGS, {"engine": "inprocess"}))
    assert done.stdout.splitlines()[-1] == one.weights_sha256
    assert len(list(tmp_path.iterdir())) == 2, "both nodes have trained"


def test_a_cluster_that_does_not_answer_is_named(
    experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def refuse(**settings: object) -> None:
        assert settings["address"] == "127.0.0.1:1"
        raise ConnectionError("Failed to connect to GCS at address 127.0.0.1:1.")

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError, match=r"no Ray cluster answers at RAY_ADDRESS = '127.0.0.1:1'"):
        run_experiment(experiment.overlay(engine="ray"))


def test_one_gpu_cannot_be_named(experiment: ExperimentConfig) -> None:
    with pytest.raises(UserError, match=r"'cuda:1': Ray gives.*CUDA_VISIBLE_DEVICES"):
        run_experiment(experiment.overlay(engine="ray", device="cuda:1"))
