"""Whole runs on a GPU that is not there: tensors in their place, in order, the CPU's numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients import session
from fedkn import normalizers
from fedkn.config import ExperimentConfig
from fedkn.experiment import device_of
from fedkn.layers import triton_switch
from fedkn.training.captured import PRODUCTS
from server.strategies import registry
from simulations.engines import together
from simulations.engines.flower_ray import gpu_share
from simulations.engines.run import run_experiment
from tests.pretended_gpu import Gpu, pretended_gpu
from tests.simulations.engines.test_tasks import CASES as TASKS

OWN = {"evaluation__client_fraction": 0.2}


@pytest.fixture
def tiny(experiment: ExperimentConfig) -> ExperimentConfig:
    return experiment.overlay(
        partition__clients=5,
        data__train_limit=60,
        data__test_limit=20,
        model__width=4,
        train__precision="float32",
        train__momentum=0.5,
        engine="batched",
    )


@pytest.fixture(autouse=True)
def own_sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave no model of a device that is gone to the tests that follow."""
    monkeypatch.setenv("FEDKN_TRITON", "0")
    triton_switch.load.cache_clear()
    _forget()
    yield
    _forget()
    triton_switch.load.cache_clear()


def _forget() -> None:
    for cached in (session._config, session._session_of, session._session):
        cached.cache_clear()
    together._known.clear()


def same_as_on_the_cpu(config: ExperimentConfig, caplog: pytest.LogCaptureFixture) -> Gpu:
    """Run `config` on the CPU and on the device; compare, and return the device."""
    here = run_experiment(config.overlay(device="cpu", engine="inprocess")).arrays
    _forget()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="flwr"), pretended_gpu() as gpu:
        there = run_experiment(config.overlay(device="cuda")).arrays
    assert [record.getMessage() for record in caplog.records] == []
    assert gpu.order.races == {}
    for name in here:
        np.testing.assert_allclose(
            there[name].numpy(), here[name].numpy(), rtol=2e-3, atol=5e-3, err_msg=name
        )
    return gpu


CASES: dict[str, dict[str, Any]] = {
    "stacked": {"normalizer__name": "kernel"},
    "stacked, FedProx": {"strategy__name": "fedprox"},
    "concurrent": {"normalizer__name": "batch"},
    "concurrent, SCAFFOLD": {"strategy__name": "scaffold"},
    "concurrent, kept momentum": {"train__keep_momentum": True},
    "concurrent, FedBN": {"normalizer__name": "fedbn", **OWN},
    "one after another": {"engine": "inprocess"},
    "Krum": {"strategy__name": "krum"},
    "Ditto": {"strategy__name": "ditto", **OWN},
    "privacy of clients": {
        "privacy__mechanism": "client_adaptive",
        "privacy__noise_multiplier": 0.1,
    },
    "privacy of examples": {"privacy__mechanism": "example", "engine": "inprocess"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_a_device_ends_in_the_cpus_numbers(
    case: str, tiny: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    same_as_on_the_cpu(tiny.overlay(**CASES[case]), caplog)


# Filters of nearly constant inputs are divided by deviations of nearly zero: rounding grows there.
UNSTEADY = ("bcn", "sws", "nf", "anfr", "online", "fbn", "ws_kernel")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["batched", "inprocess"])
@pytest.mark.parametrize("name", normalizers.names())
def test_every_normalizer_trains_on_a_device(
    name: str, engine: str, tiny: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    rounds = 1 if name in UNSTEADY else 2
    config = tiny.overlay(normalizer__name=name, engine=engine, rounds=rounds, **OWN)
    same_as_on_the_cpu(config, caplog)


# Together in a stack, and each on its own: what is aggregated is the same.
WAYS = {name: ("group", "batch")[i % 2] for i, name in enumerate(registry.names())}
WAYS["apfl"] = "group"  # it mixes no statistics


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_every_strategy_aggregates_on_a_device(
    name: str, tiny: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny.overlay(strategy__name=name, normalizer__name=WAYS[name], cohort=5, **OWN)
    same_as_on_the_cpu(config, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["batched", "inprocess"])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_on_a_device(
    name: str, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    same_as_on_the_cpu(TASKS[name].overlay(engine=engine, rounds=2, **OWN), caplog)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_a_resumed_run_ends_in_the_bits_of_one_that_went_through(
    strategy: str, tiny: ExperimentConfig, tmp_path: Path
) -> None:
    config = tiny.overlay(strategy__name=strategy, rounds=3, device="cuda")
    with pretended_gpu():
        whole = run_experiment(config).weights_sha256
        _forget()
        kept = config.overlay(checkpoint__folder=str(tmp_path))
        assert run_experiment(kept).weights_sha256 == whole
    _forget()
    cell = tmp_path / "cells" / "experiment"
    for path in cell.glob("checkpoint-000003*"):
        path.unlink()
    with pretended_gpu():
        assert run_experiment(kept).weights_sha256 == whole


def test_a_client_of_ray_or_of_a_group_takes_what_its_graphs_do(tiny: ExperimentConfig) -> None:
    config = tiny.overlay(normalizer__name="batch", device="cuda")
    with pretended_gpu():
        assert gpu_share(config) == pytest.approx(0.01)
        assert together._bytes_of_a_client(config, device_of(config), "concurrent") > 3 * PRODUCTS
