"""A user's own strategy, by reference: in a module of theirs that lies in the current folder."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fedkn import algorithms, references
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import why_alone
from server.strategies.registry import create_strategy
from simulations.engines.run import run_experiment
from tests.server.fake_grid import crashed, run, small
from tests.server.test_run import log_of

MODULE = '''
from dataclasses import dataclass

import numpy as np
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedkn.averaging import weighted_mean
from fedkn.training import LocalRule
from server.strategies.base import Strategy


class Halfway(Strategy):
    """Goes part of the way to the mean, and remembers how often it has been asked."""

    def __init__(self, config, part=0.5):
        super().__init__(config)
        self.part, self.asked = part, np.zeros(1)

    def aggregate(self, round_, sent, updates):
        self.asked = self.asked + 1
        weights = [u.metrics["num-examples"] for u in updates]
        mean = weighted_mean([u.arrays for u in updates], weights, sent)
        return {n: (1 - self.part) * x + self.part * mean[n] for n, x in sent.items()}

    def state(self):
        return {"asked": self.asked}

    def load_state(self, arrays):
        self.asked = arrays["asked"]

    def fields(self):
        return {"asked": float(self.asked[0])}


@dataclass(frozen=True)
class Decay(LocalRule):
    """Pulls the weights to zero, as strongly as the server tells."""

    strength: float = 0.01

    @classmethod
    def of(cls, told, given):
        return cls(told.get("decay", 0.01))

    @property
    def acts(self):
        return True

    def gradient(self, values, gradients, *begun):
        gradients.add_(values, alpha=self.strength)


class Decayed(Halfway):
    client_half = Decay

    def __init__(self, config, strength=0.1):
        super().__init__(config, part=1.0)
        self.strength = strength

    def instructions(self, round_, parameters, config):
        return ConfigRecord({**config, "decay": self.strength})


class Mine(FedAdam):
    """A strategy for Flower, with a setting of its own."""


class Scaled(FedAvg):
    def __init__(self, factor=1.0, **more):
        super().__init__(**more)
        self.factor, self.rounds = factor, 0

    def aggregate_train(self, server_round, replies):
        self.rounds += 1
        arrays, metrics = super().aggregate_train(server_round, replies)
        return arrays, metrics

    def state(self):
        return {"rounds": np.array([float(self.rounds)])}

    def load_state(self, arrays):
        self.rounds = int(arrays["rounds"][0])


def made(config, part):
    return Halfway(config, part)


class Wrong(Halfway):
    def __init__(self, config, how):
        super().__init__(config)
        self.how = how

    def instructions(self, round_, parameters, config):
        return {} if self.how == "instructions" else config

    def aggregate(self, round_, sent, updates):
        made = super().aggregate(round_, sent, updates)
        name = next(iter(made))
        if self.how == "missing":
            del made[name]
        if self.how == "shape":
            made[name] = made[name].reshape(-1)[:1]
        if self.how == "text":
            made[name] = "a"
        if self.how == "none":
            return None
        if self.how == "raises":
            return made["nothing of this name"]
        if self.how == "in place":
            for value in sent.values():
                value *= np.nan
            made[name] = made[name] * np.nan
        if self.how == "nan":
            made[name] = made[name] * np.nan
        return made

    def fields(self):
        return {"fields": {"odd": float("nan")}, "taken": {"cohort": 3.0}}.get(self.how, {})

    def state(self):
        return {"state": {"odd": [1]}, "words": {"odd": np.array(["a"])}}.get(self.how, {})

    def load_state(self, arrays):
        pass


class Odd:
    """No strategy at all."""

    def __init__(self, config):
        pass


class OddHalf(Halfway):
    client_half = "a word"


number = 3
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mystrategies.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("mystrategies", None)
    algorithms.client_half.cache_clear()


def own(name: str, options: dict | None = None, **changes) -> ExperimentConfig:
    settings = {"strategy__options": json.dumps(options)} if options else {}
    return small(strategy__name=f"mystrategies:{name}", **settings, **changes)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["Halfway", "made"])
def test_a_server_half_is_what_aggregates(name):
    whole = run(own(name, {"part": 1.0}))
    assert whole.weights_sha256 != run(own(name, {"part": 0.5})).weights_sha256
    plain = run(small())
    for parameter, value in plain.tensors.items():
        np.testing.assert_allclose(whole.tensors[parameter], value, rtol=1e-5, atol=1e-6)


def test_it_is_logged_and_goes_on_from_a_checkpoint(here):
    folder = here / "run"
    config = own("Halfway", rounds=4, checkpoint__folder=str(folder))
    crashed(config, in_round=3)
    resumed = run(config)
    whole = run(config.overlay(checkpoint__folder=""))
    assert resumed.weights_sha256 == whole.weights_sha256
    assert [line["asked"] for line in log_of(folder, "round")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("here")
def test_its_client_half_trains_by_what_it_tells():
    plain = run(small(train__clip_norm=0.0))
    none = run(own("Decayed", {"strength": 0.0}, train__clip_norm=0.0))
    decayed = run(own("Decayed", {"strength": 0.1}, train__clip_norm=0.0))
    weight = run(small(train__clip_norm=0.0, train__weight_decay=0.1))
    for name, value in plain.tensors.items():
        np.testing.assert_allclose(none.tensors[name], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            decayed.tensors[name], weight.tensors[name], rtol=1e-4, atol=1e-5
        )
    assert decayed.weights_sha256 != none.weights_sha256


@pytest.mark.usefixtures("here")
def test_a_client_half_alone_is_averaged_as_fedavg_does():
    config = own("Decay", train__clip_norm=0.0)
    decayed = run(config)
    weight = run(small(train__clip_norm=0.0, train__weight_decay=0.01))
    for name, value in weight.tensors.items():
        np.testing.assert_allclose(decayed.tensors[name], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"which takes no strategy\.options"):
        run(own("Decay", {"strength": 3}))


@pytest.mark.usefixtures("here")
def test_a_rule_that_says_nothing_of_stacked_clients_trains_them_alone():
    assert "Decay changes the steps of one client at a time" in why_alone(own("Decay"))
    assert not why_alone(own("Halfway"))


@pytest.mark.usefixtures("here")
def test_a_strategy_written_for_flower():
    mine = run(own("Mine", {"eta": 0.01, "tau": 0.001}))
    ours = run(
        small(strategy__name="fedadam", strategy__server_learning_rate=0.01, strategy__tau=0.001)
    )
    assert mine.weights_sha256 == ours.weights_sha256


def test_what_it_keeps_for_itself_outlives_a_round(here):
    config = own("Scaled", {"factor": 2.0}, checkpoint__folder=str(here / "run"), rounds=2)
    run(config)
    strategy = create_strategy(config, ["a"])
    strategy.load_state({"rounds": np.array([2.0])})
    assert strategy.state()["rounds"].tolist() == [2.0]
    assert run(small(rounds=2)).weights_sha256 == run(own("Scaled")).weights_sha256


@pytest.mark.usefixtures("here")
def test_it_runs_in_the_engines_of_a_simulation(monkeypatch, here):
    folder = str(here / "run")
    config = own("Halfway", {"part": 0.7}, workers=1, checkpoint__folder=folder)
    in_process = run_experiment(config.overlay(engine="inprocess"))
    assert in_process.weights_sha256 == run(own("Halfway", {"part": 0.7})).weights_sha256
    batched = run_experiment(config.overlay(engine="batched", checkpoint__folder=""))
    for name, value in in_process.arrays.items():
        np.testing.assert_allclose(
            batched.arrays[name].numpy(), value.numpy(), rtol=1e-3, atol=1e-5
        )


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Halfwy", {}, "has no attribute 'Halfwy' .it has .*Halfway"),
        ("Halfway", {"prt": 1}, "cannot be made: TypeError: .*prt"),
        ("Odd", {}, "it must be a class derived from server.strategies.base.Strategy"),
        ("number", {}, "it must be a class derived"),
        ("OddHalf", {}, "its client_half must be a class derived from fedkn.training.LocalRule"),
        ("Wrong", {"how": "instructions"}, "instructions must return a ConfigRecord"),
        ("Wrong", {"how": "missing"}, "aggregate must return an array for every parameter and no"),
        ("Wrong", {"how": "shape"}, r"aggregate must return .* is float\d+ \(1,\)"),
        ("Wrong", {"how": "text"}, "aggregate must return .* must be floating"),
        ("Wrong", {"how": "none"}, "aggregate must return .* returned NoneType"),
        ("Wrong", {"how": "raises"}, r"failed in aggregate: KeyError: .*mystrategies\.py, line"),
        ("Wrong", {"how": "fields"}, "fields must return finite numbers by name"),
        ("Wrong", {"how": "state"}, "state must return numbers in NumPy arrays"),
        ("Wrong", {"how": "words"}, "state must return numbers in NumPy arrays"),
        ("Wrong", {"how": "taken"}, "adds 'cohort' to the log, whose own field that is"),
        ("Wrong", {"how": "nan"}, "no valid update in the last"),
        ("Wrong", {"how": "in place"}, "no valid update in the last"),
    ],
)
def test_what_is_wrong_with_it_is_named_in_one_line(name, options, words):
    with pytest.raises(Exception, match=words) as caught:
        run(own(name, options))
    assert "\n" not in str(caught.value)


def test_a_package_can_register_one(here, monkeypatch):
    entry = type(
        "Entry", (), {"name": "halfway", "load": lambda self: _loaded("mystrategies", "Halfway")}
    )()
    monkeypatch.setattr(references, "_registered", lambda kind: {"halfway": entry})
    monkeypatch.setattr(
        algorithms, "registered", lambda kind: ("halfway",) if kind == "strategy" else ()
    )
    named = run(small(strategy__name="halfway"))
    assert named.weights_sha256 == run(own("Halfway")).weights_sha256
    # A name of our own is never another's.
    assert not algorithms.is_own("fedadam")
    assert not algorithms.is_own("fedavg")


def _loaded(module: str, name: str):
    return getattr(importlib.import_module(module), name)


def test_ours_take_no_options():
    with pytest.raises(UserError, match=r"strategy 'fedavg' takes no strategy\.options"):
        run(small(strategy__options='{"a": 1}'))


@pytest.mark.usefixtures("here")
def test_noise_calibrated_to_a_mean_is_not_added_to_something_else():
    with pytest.raises(UserError, match="bounds what one client adds to a mean"):
        create_strategy(own("Halfway", privacy__mechanism="server_fixed"))


def test_the_names_of_flowers_strategies_are_said_once():
    from server.strategies import registry

    assert set(registry._FLOWERS) == set(algorithms.OF_FLOWER)
    assert Path(algorithms.__file__).parent.name == "algorithms"
