"""Clients of a run on several GPUs, and on one that is full: with GPUs that are not there."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from fedkn.config import ExperimentConfig
from fedkn.gpus import GpuFull
from simulations.engines import crew as crew_module
from simulations.engines import together, worker
from simulations.engines.choice import gpus_of, processes_of, sharers_of
from simulations.engines.run import run_experiment
from tests.own_parts import Plain
from tests.simulations.engines.test_same_weights import eager_workers

__all__ = ["eager_workers"]

GIB = 2**30
PARENT = "FEDKN_TEST_PARENT"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    def put(count: int, free: int = 70 * GIB) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
        # The models themselves stay here.
        monkeypatch.setattr(together, "_bytes_of_a_client", lambda *args: GIB // 8)

    return put


def test_processes_are_spread_over_all_gpus_and_one_that_is_named_is_kept_to(
    gpus, experiment: ExperimentConfig
) -> None:
    auto = experiment.overlay(workers=0, cohort=8)
    gpus(4)
    assert gpus_of(auto) == ["0", "1", "2", "3"]
    assert (processes_of(auto), sharers_of(auto)) == (4, 1)
    six = auto.overlay(workers=6)
    assert gpus_of(six) == ["0", "1", "2", "3", "0", "1"]
    assert (processes_of(six), sharers_of(six)) == (6, 2)
    pinned = auto.overlay(device="cuda:2")
    assert gpus_of(pinned) == []
    assert (processes_of(pinned), sharers_of(pinned)) == (1, 1)
    assert gpus_of(auto.overlay(device="cpu")) == []
    gpus(1)
    assert gpus_of(auto) == []
    assert (processes_of(auto), sharers_of(auto)) == (1, 1)


def test_a_stacked_group_depends_on_no_number_of_gpus_nor_on_what_others_hold(
    gpus, experiment: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = experiment.overlay(
        workers=0, cohort=300, partition__clients=400, engine="batched", device="cuda"
    )
    sizes = set()
    for count in (1, 2, 4):
        for free in (30, 70):
            gpus(count, free * GIB)
            sizes.add(together.group_size(config))
    assert sizes == {100}
    assert not caplog.records
    gpus(1, 4 * GIB)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert together.group_size(config) == 32
    assert "32 clients train together in place of 100" in caplog.text


def test_concurrent_clients_are_divided_among_the_gpus(gpus, experiment: ExperimentConfig) -> None:
    config = experiment.overlay(
        workers=0, cohort=60, partition__clients=80, normalizer__name="batch", device="cuda"
    )
    for count, size in ((1, 60), (2, 30), (4, 15)):
        gpus(count)
        assert together.group_size(config) == size


@pytest.mark.usefixtures("eager_workers")
def test_a_worker_on_another_kind_of_gpu_trains_nobody(
    experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The parent takes itself for a GPU's process; its worker finds none.
    monkeypatch.setattr(worker, "gpu_kind", lambda device: "H100")
    with caplog.at_level(logging.WARNING, logger="flwr"):
        other = run_experiment(experiment.overlay(engine="inprocess", workers=2))
    assert "its GPU (none) is not of the kind that this run began on" in caplog.text
    one = run_experiment(experiment.overlay(engine="inprocess"))
    assert other.weights_sha256 == one.weights_sha256


class Full(Plain):
    """A network for which a GPU's memory suffices in the parent process, elsewhere not for long."""

    steps = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Full.steps += self.training
        elsewhere = os.environ.get(PARENT) not in (None, str(os.getpid()))
        # Not in the step that is tried before the first round.
        if elsewhere and Full.steps > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        found: torch.Tensor = super().forward(x)
        return found


def full(experiment: ExperimentConfig, engine: str, workers: int) -> ExperimentConfig:
    return experiment.overlay(
        engine=engine,
        workers=workers,
        cohort=6,
        rounds=30,
        model__name=f"{__name__}:Full",
        model__width=0,
        device="cpu",
    )


@pytest.mark.parametrize("engine", ["inprocess", "batched"])
def test_a_full_gpu_ends_the_run_and_says_what_to_change(
    engine: str, experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Full, "steps", 0)
    monkeypatch.setenv(PARENT, "another")
    with pytest.raises(GpuFull, match=r"client \d: CUDA out of memory\. .*compare\.workers"):
        run_experiment(full(experiment, engine, 1))


def test_a_full_gpu_of_a_worker_ends_the_run_too(
    experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew_module, "PATIENCE", 0.0)
    monkeypatch.setenv(PARENT, str(os.getpid()))
    with pytest.raises(GpuFull, match=r"client \d: CUDA out of memory"):
        run_experiment(full(experiment, "inprocess", 2).overlay(rounds=100_000))
