"""Strategies by name, with the options of the configuration: ours, Flower's, and somebody's own.

An algorithm of ours is known by the name of its two files (`fedkn.algorithms`); of Flower's
strategies only the aggregation is their own, and their clients train as FedAvg's do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from flwr.serverapp.strategy import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
)

from fedkn import algorithms
from fedkn.config import ExperimentConfig, StrategyConfig
from fedkn.errors import UserError, unknown_name
from fedkn.experiment import task_of
from fedkn.federation import TRAIN_LOSS
from fedkn.references import registered
from server.strategies import combining
from server.strategies.base import Strategy
from server.strategies.differential_privacy import PrivateMean
from server.strategies.flower import (
    EVERY_NODE,
    AfterTheMean,
    Combine,
    Combined,
    FlowerStrategy,
    quiet_flower,
)
from server.strategies.own import OwnStrategy

__all__ = ["create_strategy", "names"]


def names() -> tuple[str, ...]:
    """Return the names of the strategies."""
    return (*algorithms.names(), *_FLOWERS)


def create_strategy(config: ExperimentConfig, parameters: Sequence[str] = ()) -> Strategy:
    """Return the configured strategy for the shared `parameters` of these names.

    With ``privacy.mechanism`` of clients it is wrapped: it then clips and adds noise.

    Raises:
        UserError: the name is unknown, an option or the mechanism does not go with it, or the
            cohort is too small for what it promises.
    """
    name = config.strategy.name
    own = algorithms.is_own(name)
    if not own and name not in names():
        raise unknown_name("strategy", name, [*names(), *registered("strategy")])
    if config.strategy.options and not own:
        raise UserError(
            f"strategy '{name}' takes no strategy.options: what it can be set to are settings of "
            "their own, strategy.… (docs/strategies.md)"
        )
    if name == "qfedavg" and task_of(config).least_loss < 0:
        raise UserError(
            "strategy 'qfedavg' weighs clients by powers of their loss, which this task may have "
            "below 0: give the task least_loss = 0 if it cannot be, or choose another strategy"
        )
    mechanism = config.privacy.mechanism
    of_clients = mechanism.startswith(("server_", "client_"))
    if of_clients and name not in (means := _plain_means()):
        raise UserError(
            f"privacy.mechanism = '{mechanism}' bounds what one client adds to a mean, which "
            f"'{name}' does not take: set strategy.name to {' or '.join(means)}"
        )
    with quiet_flower():
        if own:
            return OwnStrategy(config, parameters)
        if name in _FLOWERS:
            return _flowers(name, config, parameters)
        strategy = _server_half(name)(config)
        return PrivateMean(config, strategy, parameters) if of_clients else strategy


def _server_half(name: str) -> type[Strategy]:
    """Return the server half of the algorithm `name`: ``STRATEGY`` of the module of that name."""
    half: type[Strategy] = import_module(f"{__package__}.{name}").STRATEGY
    return half


def _plain_means() -> list[str]:
    return [name for name in algorithms.names() if _server_half(name).is_plain_mean]


def _flowers(name: str, config: ExperimentConfig, parameters: Sequence[str]) -> FlowerStrategy:
    """Return Flower's strategy, which trains every node that it is shown, on the stack."""
    tolerated = config.strategy.malicious_clients
    factor, constant = _SMALLEST_COHORT.get(name, (0, 1))
    if config.cohort < (needed := factor * tolerated + constant):
        raise UserError(
            f"{name} with strategy.malicious_clients = {tolerated} needs cohort >= {needed}, got "
            f"{config.cohort}: raise cohort or tolerate fewer"
        )
    build, options, made = _FLOWERS[name]
    arguments = {key: value for key, value in options(config).items() if value != "default"}
    return made(build(**EVERY_NODE, **arguments), parameters)


# Updates needed to tolerate f malicious clients, a·f + b as (a, b): arXiv 1703.02757, Prop. 4.2,
# and arXiv 1802.07927, Section 3.
_SMALLEST_COHORT = {"krum": (2, 3), "multikrum": (2, 3), "bulyan": (4, 3)}

Options = Callable[[ExperimentConfig], dict[str, Any]]


def _none(config: ExperimentConfig) -> dict[str, Any]:
    del config
    return {}


def _adaptive(config: ExperimentConfig) -> dict[str, Any]:
    return {"eta": config.strategy.server_learning_rate, "tau": config.strategy.tau}


def _of(build: Callable[[StrategyConfig], dict[str, Any]]) -> Options:
    return lambda config: build(config.strategy)


Made = Callable[[FedAvg, Sequence[str]], FlowerStrategy]


def _combined(combine: Combine) -> Made:
    return lambda strategy, parameters: Combined(strategy, parameters, combine)


_FLOWERS: dict[str, tuple[type[FedAvg], Options, Made]] = {
    "fedavgm": (
        FedAvgM,
        _of(
            lambda s: {
                "server_learning_rate": s.server_learning_rate,
                "server_momentum": s.server_momentum,
            }
        ),
        AfterTheMean,
    ),
    "fedadam": (FedAdam, _adaptive, AfterTheMean),
    "fedyogi": (FedYogi, _adaptive, AfterTheMean),
    "fedadagrad": (FedAdagrad, _adaptive, AfterTheMean),
    "qfedavg": (
        QFedAvg,
        # q-FedAvg estimates the Lipschitz constant by the clients' own learning rate.
        lambda config: {
            "client_learning_rate": config.train.learning_rate,
            "q": config.strategy.q,
            "train_loss_key": TRAIN_LOSS,
        },
        _combined(combining.q_mean),
    ),
    "fedmedian": (FedMedian, _none, _combined(combining.median)),
    "fedtrimmedavg": (
        FedTrimmedAvg,
        _of(lambda s: {"beta": s.trim}),
        _combined(combining.trimmed_mean),
    ),
    "krum": (
        Krum,
        _of(lambda s: {"num_malicious_nodes": s.malicious_clients}),
        _combined(combining.krum),
    ),
    "multikrum": (
        MultiKrum,
        lambda config: {
            "num_malicious_nodes": config.strategy.malicious_clients,
            "num_nodes_to_select": max(1, config.cohort - config.strategy.malicious_clients),
        },
        _combined(combining.krum),
    ),
    "bulyan": (
        Bulyan,
        _of(lambda s: {"num_malicious_nodes": s.malicious_clients}),
        _combined(combining.bulyan),
    ),
}
