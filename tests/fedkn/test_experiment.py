from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import (
    build_model,
    data_summary,
    device_of,
    federated_data,
    inputs_of,
    normalizer_of,
)


def configured(**changes) -> ExperimentConfig:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return ExperimentConfig.resolve({"model.width": 4}, dotted)


def test_every_training_image_is_with_one_client_or_held_for_validation():
    data = federated_data(configured())
    held = torch.cat([data.client(p).targets for p in range(20)])
    assert sorted(np.concatenate(data.parts).tolist()) == list(range(len(data.train)))
    assert len(held) == len(data.train)
    everything = len(data.train) + len(data.validation) + len(data.test)
    assert everything == 1797  # scikit-learn's digits
    assert len(data.validation) / (len(data.train) + len(data.validation)) == pytest.approx(
        0.15, abs=0.01
    )
    images = {
        image.numpy().tobytes()
        for part in (data.train, data.validation, data.test)
        for image in part.inputs
    }
    assert len(images) > 0.99 * everything  # no part repeats another


def test_the_split_is_the_datas_and_the_partition_the_seeds():
    one, other = (federated_data(configured(seed=seed)) for seed in (0, 1))
    assert torch.equal(one.train.inputs, other.train.inputs)
    assert torch.equal(one.validation.inputs, other.validation.inputs)
    assert any(not np.array_equal(a, b) for a, b in zip(one.parts, other.parts, strict=True))
    again = federated_data(configured(seed=0, train__batch_size=4, rounds=3))
    assert all(np.array_equal(a, b) for a, b in zip(one.parts, again.parts, strict=True))


def test_limits_keep_the_proportions_of_the_labels():
    data = federated_data(
        configured(data__train_limit=300, data__test_limit=50, partition__clients=5)
    )
    assert abs(len(data.train) + len(data.validation) - 300) <= 10
    assert abs(len(data.test) - 50) <= 10
    counts = torch.bincount(data.test.targets, minlength=10)
    assert counts.min() >= 3


def test_no_validation_images_where_none_are_wanted():
    data = federated_data(configured(data__validation_fraction=0.0))
    assert len(data.validation) == 0


def test_even_a_tiny_validation_fraction_holds_something():
    assert len(federated_data(configured(data__validation_fraction=1e-6)).validation) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__source": "mnist", "data__root": "/nowhere"}, "nowhere"),
        ({"data__source": "cifar10"}, "root"),
        ({"partition__scheme": "shards", "partition__shards_per_client": 500}, "shard"),
        ({"partition__minimum": 500}, "minimum"),
    ],
)
def test_data_that_cannot_be_had_is_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        federated_data(configured(**changes))
    assert "\n" not in str(error.value)


def test_the_model_depends_on_the_seed_alone():
    one, again, other = (build_model(configured(seed=seed)) for seed in (0, 0, 1))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    later = build_model(configured(seed=0, rounds=2, partition__clients=6))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, later.state_dict()[name])
    assert any(
        not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_models_of_one_configuration_share_nothing():
    one, other = build_model(configured()), build_model(configured())
    with torch.no_grad():
        next(one.parameters()).fill_(7.0)
    assert not (next(other.parameters()) == 7).any()


def test_inputs_are_scaled_as_configured():
    cpu = torch.device("cpu")
    data = federated_data(configured())
    pixels = data.train.inputs
    standardized = inputs_of(configured(), cpu)(torch.cat([pixels, data.validation.inputs]))
    assert standardized.mean().item() == pytest.approx(0, abs=0.02)
    assert standardized.std().item() == pytest.approx(1, abs=0.02)
    unit = inputs_of(configured(data__scaling="unit"), cpu)(pixels)
    assert (unit.min().item(), unit.max().item()) == (0.0, 1.0)
    centered = inputs_of(configured(data__scaling="centered"), cpu)(pixels)
    torch.testing.assert_close(centered, unit * 2 - 1)


@pytest.mark.parametrize(("name", "scaling"), [("kernel", "unit"), ("group", "standardized")])
def test_published_scaling_is_the_normalizers(name, scaling):
    config = configured(normalizer__name=name, data__scaling="published")
    assert inputs_of(config, torch.device("cpu")).scaling == scaling


def test_groups_reach_those_normalizers_that_have_them():
    assert normalizer_of(configured(normalizer__name="group", normalizer__groups=2)) != (
        normalizer_of(configured(normalizer__name="group"))
    )
    assert normalizer_of(configured(normalizer__name="kernel", normalizer__groups=2)) == (
        normalizer_of(configured(normalizer__name="kernel"))
    )


@pytest.mark.parametrize("name", ["cuda:77", "tpu", "mps", "cpu:", "", "cuda:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UserError, match="device = '") as error:
        device_of(configured(device=name))
    assert "\n" not in str(error.value)


def test_the_device_is_found():
    assert device_of(configured(device="cpu")).type == "cpu"
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert device_of(configured(device="auto")).type == expected


def test_no_cache_is_left_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    federated_data(configured(seed=77))
    assert not list(Path().iterdir())


@pytest.mark.parametrize("scaling", ["standardized", "unit", "published"])
def test_a_summary_stands_in_for_the_source(scaling):
    """To the bit, on a machine that has no such data."""
    here = configured(data__scaling=scaling, normalizer__name="group")
    summary = data_summary(here)
    assert summary.classes == tuple("0123456789")
    assert summary.shape == (1, 8, 8)
    assert bool(summary.mean) == bool(summary.deviation) == (scaling != "unit")
    elsewhere = here.overlay(data__source="image_folder", data__root="/only/on/the/server")
    one, other = build_model(here), build_model(elsewhere, summary)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    pixels = federated_data(here).train.inputs[:9]
    ours, theirs = (
        inputs_of(here, torch.device("cpu")),
        inputs_of(elsewhere, torch.device("cpu"), summary),
    )
    assert torch.equal(ours(pixels), theirs(pixels))
    with pytest.raises(UserError, match="/only/on/the/server"):
        build_model(elsewhere)
