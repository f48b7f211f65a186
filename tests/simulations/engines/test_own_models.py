"""A user's own network in every engine: the same bits where promised, frozen parts as they were."""

from __future__ import annotations

import json

import pytest
import torch

from fedkn.config import ExperimentConfig
from fedkn.experiment import build_model, network_of, why_alone
from fedkn.federation import arrays_to_tensors
from fedkn.reference import federated_averaging
from server.checkpoints import weights_sha256
from simulations.engines.run import run_experiment
from simulations.runs.folder import RunFolder

TINY = {
    "rounds": 2,
    "cohort": 4,
    "workers": 1,
    "partition.clients": 6,
    "data.train_limit": 120,
    "data.test_limit": 30,
    "train.local_steps": 2,
    "train.momentum": 0.9,
    "train.weight_decay": 0.01,
    "device": "cpu",
}
FROZEN = "conv1.*, bn1.*"


def configured(name="Plain", normalizer="group", **settings) -> ExperimentConfig:
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    own = {"model.name": f"tests.own_parts:{name}", "normalizer.name": normalizer}
    return ExperimentConfig.resolve(TINY, own, dotted)


def trained(config: ExperimentConfig) -> dict[str, torch.Tensor]:
    return arrays_to_tensors(run_experiment(config).arrays)


@pytest.mark.parametrize(
    ("name", "normalizer", "settings"),
    [
        ("Plain", "batch", {}),
        ("Plain", "kernel", {}),
        ("Plain", "group", {"model__options": {"drop": 0.5}}),
        ("with_blocks", "kernel", {}),
        ("mobilenet", "group", {"train__local_steps": 1, "rounds": 1}),
        ("Plain", "batch", {"model__frozen": FROZEN}),
        # A group norm whose input no gradient is asked of.
        ("Plain", "group", {"model__frozen": "conv1.*"}),
        ("with_blocks", "group", {"model__frozen": "0.conv.*"}),
        ("Plain", "layer", {"model__frozen": "conv1.*"}),
        ("Plain", "instance", {"model__frozen": "conv1.*"}),
        ("Plain", "ws_group", {"model__frozen": "conv1.*"}),
        ("Plain", "fedbn", {"model__frozen": FROZEN, "evaluation__client_fraction": 0.2}),
        ("Plain", "batch", {"model__frozen": FROZEN, "normalizer__bn_statistics": "recalibrated"}),
        ("Plain", "hbn", {"model__frozen": FROZEN, "evaluation__client_fraction": 0.2}),
        ("Plain", "fbn", {"model__frozen": FROZEN}),
        ("indexed", "none", {"model__frozen": "index"}),
    ],
)
def test_the_engine_ends_in_the_references_bits(name, normalizer, settings):
    config = configured(name, normalizer, engine="inprocess", **settings)
    outcome = run_experiment(config)
    reference = federated_averaging(config)
    assert weights_sha256(reference) == outcome.weights_sha256
    assert weights_sha256(
        {n: t.numpy() for n, t in arrays_to_tensors(outcome.arrays).items()}
    ) == outcome.weights_sha256  # fmt: skip


@pytest.mark.parametrize("workers", [2])
def test_workers_find_the_users_module(workers):
    one, several = (
        run_experiment(configured(engine="inprocess", workers=w, rounds=1)).weights_sha256
        for w in (1, workers)
    )
    assert one == several


@pytest.mark.parametrize(
    ("normalizer", "frozen"), [("group", ""), ("group", FROZEN), ("kernel", FROZEN)]
)
def test_together_is_one_by_one_to_rounding(normalizer, frozen):
    one, together = (
        trained(configured(normalizer=normalizer, engine=engine, model__frozen=frozen))
        for engine in ("inprocess", "batched")
    )
    assert list(one) == list(together)
    for name, value in one.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6)


def test_a_layer_that_asks_for_one_by_one_is_named_in_the_record(tmp_path):
    assert not why_alone(configured())
    config = configured(model__options={"drop": 0.5}, rounds=1, checkpoint__folder=str(tmp_path))
    assert why_alone(config) == "Dropout 'drop' draws random numbers of its own"
    run_experiment(config)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["model"]["alone"] == why_alone(config)
    assert line["model"]["conversion"]["all_changed"] == 2
    with pytest.raises(ValueError, match="Dropout 'drop' draws random numbers of its own"):
        run_experiment(config.overlay(engine="batched"))


@pytest.mark.parametrize("settings", [
    {"engine": "inprocess", "normalizer": "batch"},
    {"engine": "inprocess", "strategy__name": "scaffold"},
    {"engine": "inprocess", "strategy__name": "fedprox", "train__keep_momentum": True},
    {"engine": "inprocess", "strategy__name": "fedadam"},
    {"engine": "inprocess", "strategy__name": "fednova"},
    {"engine": "inprocess", "privacy__mechanism": "example", "train__local_steps": 1},
    {"engine": "batched"},
])  # fmt: skip
def test_what_is_frozen_is_not_sent_and_ends_with_the_initial_bits(tmp_path, settings):
    settings.setdefault("normalizer", "group")
    config = configured(model__frozen=FROZEN, checkpoint__folder=str(tmp_path), **settings)
    outcome = run_experiment(config)
    sent = arrays_to_tensors(outcome.arrays)
    network = network_of(config)
    assert not set(network.frozen) & sent.keys()
    assert "conv2.weight" in sent
    assert not torch.equal(sent["conv2.weight"], network.module.state_dict()["conv2.weight"])
    # Bytes: those of the arrays that are sent, each with its .npy header, and no more.
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    sizes = sum(len(a.data) for a in outcome.arrays.values())
    rounds = [line for line in lines if line["kind"] == "round"]
    copies = 2 if settings.get("strategy__name") == "scaffold" else 1
    assert all(r["bytes_down"] <= copies * sizes * len(r["cohort"]) + 64 for r in rounds)
    assert all(not r["refused"] and not r["failed"] for r in rounds)
    # The model as a whole: the frozen part is the one that the configuration builds.
    again = build_model(config).state_dict()
    assert all(torch.equal(again[n], network.module.state_dict()[n]) for n in network.frozen)
    record = RunFolder(tmp_path).cells()[0].model
    assert record is not None
    assert record.frozen_tensors == len(network.frozen)
    assert record.trained < record.parameters


def test_a_resumed_run_with_frozen_parts_ends_in_the_same_weights(tmp_path):
    config = configured(normalizer="batch", model__frozen=FROZEN, engine="inprocess")
    whole = run_experiment(config).weights_sha256
    folder = {"checkpoint.folder": str(tmp_path)}
    files = tmp_path / "cells" / "experiment"
    run_experiment(config.resolve(config.flat(), folder))
    (files / "checkpoint-000002.safetensors").unlink()
    assert run_experiment(config.resolve(config.flat(), folder)).weights_sha256 == whole


def test_a_client_with_another_frozen_part_is_refused(monkeypatch, caplog):
    config = configured(normalizer="group", model__frozen=FROZEN, engine="inprocess", rounds=1)
    monkeypatch.setattr("clients.session.fixed_sha256", lambda rule, state: "another")
    with pytest.raises(Exception, match=r"model.frozen keeps as they are differ from the server"):
        run_experiment(config)
