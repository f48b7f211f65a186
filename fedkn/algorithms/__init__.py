"""Algorithms: for each a file here, its client half, and one of its name in server/strategies/.

An algorithm is known by the name of its files, which is its ``strategy.name``: to add one is to add
the two. A strategy without a file here trains as FedAvg does: only its server half is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

from fedkn.algorithms.fedavg import FedAvg
from fedkn.config import ExperimentConfig
from fedkn.training.kept_momentum import KeptMomentum
from fedkn.training.rule import LocalRule
from fedkn.training.update_clipping import ClippedUpdate

__all__ = ["client_half", "local_rules", "names", "rule_types"]


@cache
def names() -> tuple[str, ...]:
    """Return the names of the algorithms that have a client half of their own."""
    return tuple(sorted(module.name for module in iter_modules(__path__)))


@cache
def client_half(name: str) -> type[LocalRule]:
    """Return the rule by which clients train under the strategy `name`."""
    if name not in names():
        return FedAvg
    rule: type[LocalRule] = import_module(f"{__name__}.{name}").RULE
    return rule


def rule_types(config: ExperimentConfig) -> tuple[type[LocalRule], ...]:
    """Return the rules by which the clients of `config` train, in the order in which they apply."""
    kept = (KeptMomentum,) if config.train.keep_momentum else ()
    clipped = (ClippedUpdate,) if config.privacy.mechanism.startswith("client_") else ()
    return *kept, client_half(config.strategy.name), *clipped


def local_rules(
    config: ExperimentConfig, told: Mapping[str, Any], given: Mapping[str, Tensor]
) -> tuple[LocalRule, ...]:
    """Return the rules of a round, by what the server's message tells and gives (`LocalRule.of`).

    Raises:
        UserError: what one of them needs is not there.
    """
    return tuple(rule.of(told, given) for rule in rule_types(config))
