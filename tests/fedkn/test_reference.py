"""The engines against the definition: federated averaging on one page."""

from __future__ import annotations

import numpy as np
import pytest

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.reference import federated_averaging
from simulations.engines import crew as crew_module
from simulations.engines.crew import Crew
from simulations.engines.run import run_experiment


def experiment(**changes) -> ExperimentConfig:
    return ExperimentConfig.resolve(
        {
            "rounds": 3,
            "cohort": 3,
            "workers": 1,
            "engine": "inprocess",
            "device": "cpu",
            "partition.clients": 5,
            "partition.minimum": 4,
            "data.train_limit": 90,
            "data.test_limit": 20,
            "data.flip": True,
            "data.crop_padding": 1,
            "model.name": "convnet3",
            "model.width": 8,
            "train.batch_size": 3,
            "train.momentum": 0.5,
            "train.weight_decay": 1e-3,
            "train.clip_norm": 1.0,
        },
        {key.replace("__", "."): value for key, value in changes.items()},
    )


LOCAL = {"evaluation__client_fraction": 0.2}
CASES = {
    "kernel": {},
    "ws_group": {},
    "batch": {},
    "batch, recalibrated": {"normalizer__bn_statistics": "recalibrated"},
    "fedbn": LOCAL,
    "hbn": LOCAL,
    "fbn": {},
    "fixbn": {"normalizer__frozen_from": 2},
    "none": {"train__schedule": "cosine", "train__local_steps": 2},
}


def assert_same_bits(config: ExperimentConfig, reference: dict[str, np.ndarray]) -> None:
    arrays = run_experiment(config).arrays
    assert arrays.keys() == reference.keys()
    for name, value in reference.items():
        ours = arrays[name].numpy()
        assert (ours.dtype, ours.tobytes()) == (value.dtype, value.tobytes()), name


@pytest.mark.parametrize("case", CASES)
def test_inprocess_ends_in_the_bits_of_the_definition(case: str) -> None:
    config = experiment(normalizer__name=case.partition(",")[0], **CASES[case])
    assert_same_bits(config, federated_averaging(config))


def test_so_it_does_in_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Crew._start

    def start_and_wait(crew: Crew, place: int) -> None:
        start(crew, place)
        while not all(worker.ready for worker in crew._workers):
            crew._collect(0.1)

    monkeypatch.setattr(crew_module, "PATIENCE", 0.0)
    monkeypatch.setattr(Crew, "_start", start_and_wait)
    config = experiment(normalizer__name="batch")
    assert_same_bits(config.overlay(workers=2), federated_averaging(config))


@pytest.mark.parametrize("normalizer", ["kernel", "ws_group"])
def test_batched_equals_the_definition_but_for_rounding(normalizer: str) -> None:
    config = experiment(normalizer__name=normalizer, rounds=2, cohort=4)
    reference = federated_averaging(config)
    arrays = run_experiment(config.overlay(engine="batched")).arrays
    assert arrays.keys() == reference.keys()
    ours = np.concatenate([arrays[name].numpy().ravel() for name in reference])
    theirs = np.concatenate([value.ravel() for value in reference.values()])
    assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_the_definition_learns() -> None:
    """It moves every tensor that is shared, and another seed ends elsewhere."""
    config = experiment(normalizer__name="kernel")
    once, again, other = (federated_averaging(config.overlay(seed=seed)) for seed in (0, 0, 1))
    assert all(once[name].tobytes() == again[name].tobytes() for name in once)
    assert all(once[name].tobytes() != other[name].tobytes() for name in once)


@pytest.mark.parametrize(
    "change",
    [
        {"strategy__name": "fedadam"},
        {"privacy__mechanism": "example"},
        {"train__keep_momentum": True},
        {"train__accumulate": 2},
    ],
)
def test_it_refuses_what_is_not_on_its_page(change) -> None:
    with pytest.raises(UserError, match="federated averaging alone"):
        federated_averaging(experiment(**change))
