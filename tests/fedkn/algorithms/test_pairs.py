"""An algorithm is a pair of files under one name, and the training loops know none of the names."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fedkn import algorithms
from fedkn.algorithms.scaffold import Scaffold
from fedkn.config import ExperimentConfig, TrainConfig
from fedkn.errors import UserError
from fedkn.experiment import why_alone
from fedkn.training import Inputs, LocalRule, LocalTask
from fedkn.training.kept_momentum import KeptMomentum
from fedkn.training.stacked import train_stacked
from fedkn.training.stacked_batches import StackedClient
from fedkn.training.stacked_workspace import StackedWorkspace
from fedkn.training.update_clipping import ClippedUpdate
from server.strategies import registry
from server.strategies.base import Strategy
from tests.fedkn.training.test_local import build, data

REPOSITORY = Path(__file__).parents[3]


def config(**changes) -> ExperimentConfig:
    return ExperimentConfig.resolve({k.replace("__", "."): v for k, v in changes.items()})


@pytest.mark.parametrize("name", algorithms.names())
def test_both_halves_are_found_under_the_algorithms_name(name):
    client, server = (
        import_module(f"{package}.{name}") for package in ("fedkn.algorithms", "server.strategies")
    )
    assert algorithms.client_half(name) is client.RULE
    assert issubclass(client.RULE, LocalRule)
    assert isinstance(registry.create_strategy(config(strategy__name=name)), server.STRATEGY)
    assert issubclass(server.STRATEGY, Strategy)
    # Each half says where the other is, and the paper.
    assert f"server/strategies/{name}.py" in (client.__doc__ or "")
    assert f"fedkn/algorithms/{name}.py" in (server.__doc__ or "")
    assert "arXiv" in (client.__doc__ or "")


def test_a_strategy_without_a_client_half_trains_as_fedavg_does():
    for name in set(registry.names()) - set(algorithms.names()):
        assert algorithms.client_half(name) is algorithms.client_half("fedavg")


@pytest.mark.parametrize("word", ["fedprox|proximal", "scaffold", "fednova", "keep_momentum"])
def test_the_training_loops_name_no_algorithm(word):
    loops = ("local", "recorded", "stacked", "concurrent", "private", "rule", "optimizer")
    for loop in loops:
        text = (REPOSITORY / "fedkn" / "training" / f"{loop}.py").read_text(encoding="utf-8")
        assert not re.search(word, text, re.IGNORECASE), loop


def test_an_algorithm_is_named_by_its_two_files_and_the_configuration():
    named = {
        str(path.relative_to(REPOSITORY))
        for package in ("fedkn", "clients", "server", "simulations")
        for path in (REPOSITORY / package).rglob("*.py")
        if re.search("fedprox|proximal", path.read_text(encoding="utf-8"), re.IGNORECASE)
    }
    assert named == {
        "fedkn/algorithms/fedprox.py",
        "fedkn/server_sections.py",
        "server/strategies/fedprox.py",
    }


def test_the_configuration_decides_which_rules_apply_and_in_which_order():
    plain = algorithms.rule_types(config())
    assert plain == (algorithms.client_half("fedavg"),)
    every = config(
        strategy__name="fedprox",
        train__keep_momentum=True,
        privacy__mechanism="client_fixed",
        privacy__noise_multiplier=0.1,
    )
    told = {"proximal-mu": 0.5, "clipping_norm": 2.0}
    kept, term, clipped = algorithms.local_rules(every, told, {})
    assert kept == KeptMomentum()
    assert term == algorithms.client_half("fedprox")(0.5)  # type: ignore[call-arg]
    assert clipped == ClippedUpdate(2.0)
    with pytest.raises(UserError, match="no float 'clipping_norm'"):
        algorithms.local_rules(every, {}, {})


def test_a_rule_says_why_clients_under_it_train_alone():
    assert not why_alone(config(strategy__name="fedprox"))
    assert "scaffold corrects" in why_alone(config(strategy__name="scaffold"))
    assert "keeps a velocity" in why_alone(config(train__keep_momentum=True))


@pytest.mark.parametrize("rule", [Scaffold(), KeptMomentum()])
def test_such_clients_are_not_stacked(rule):
    model = build("group")
    task = LocalTask(0, 1, 0, TrainConfig(), 0.1, rules=(rule,))
    client = StackedClient(task, {}, *data())
    with pytest.raises(ValueError, match="keep nothing and correct nothing"):
        train_stacked(StackedWorkspace(model, 1), [client], inputs=Inputs("unit"), minimum_batch=1)


def test_the_update_is_sent_no_further_than_the_norm_from_what_was_received():
    received = {"a": torch.zeros(2), "b": torch.zeros(3)}
    trained = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 4.0, 0.0])}
    sent = ClippedUpdate(1.0).sent(trained, received)
    torch.testing.assert_close(sent["a"], torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(sent["b"], torch.tensor([0.0, 0.8, 0.0]))
    assert LocalRule().sent(trained, received) == trained
