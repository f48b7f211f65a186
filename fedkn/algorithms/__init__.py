"""Algorithms: for each a file here, its client half, and one of its name in server/strategies/.

An algorithm is known by the name of its files, which is its ``strategy.name``: to add one is to add
the two. A strategy without a file here trains as FedAvg does: only its server half is its own. A
user's own is found by reference, or as a package registered it (`fedkn.references`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor, nn

from fedkn.algorithms.fedavg import FedAvg
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.normalizers import FederationRule, Normalizer, TensorRole
from fedkn.references import find, is_reference, registered
from fedkn.text import printable
from fedkn.training.adaptive_clipping import AdaptiveClipping, adaptive_clip
from fedkn.training.kept_momentum import KeptMomentum
from fedkn.training.rule import LocalRule
from fedkn.training.update_clipping import ClippedUpdate

__all__ = [
    "OF_FLOWER",
    "client_half",
    "federation_rule",
    "is_own",
    "keeps_model",
    "local_rules",
    "names",
    "rule_types",
]

OF_FLOWER = (
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "qfedavg",
    "fedmedian",
    "fedtrimmedavg",
    "krum",
    "multikrum",
    "bulyan",
)
"""Strategies of Flower's by our names for them: they have a server half alone."""


@cache
def names() -> tuple[str, ...]:
    """Return the names of the algorithms that have a client half of their own."""
    return tuple(sorted(module.name for module in iter_modules(__path__)))


def is_own(name: str) -> bool:
    """Whether `name` is that of somebody's own strategy, by its form or by a registration."""
    ours = name in names() or name in OF_FLOWER
    return not ours and (is_reference(name) or name in registered("strategy"))


@cache
def client_half(name: str) -> type[LocalRule]:
    """Return the rule by which clients train under the strategy `name`.

    Somebody's own strategy is a `LocalRule` itself, whose server half is FedAvg's, or a server half
    that may name one as its ``client_half``.

    Raises:
        UserError: somebody's own strategy cannot be loaded, or its client half is none.
    """
    if name in names():
        rule: type[LocalRule] = import_module(f"{__name__}.{name}").RULE
        return rule
    if not is_own(name):
        return FedAvg
    found = find("strategy", name, {})
    half = found if _is_rule(found) else getattr(found, "client_half", FedAvg)
    if not _is_rule(half):
        raise UserError(
            f"strategy '{printable(name, 120)}': its client_half must be a class derived from "
            "fedkn.training.LocalRule"
        )
    own: type[LocalRule] = half
    return own


def rule_types(config: ExperimentConfig) -> tuple[type[LocalRule], ...]:
    """Return the rules by which the clients of `config` train, in the order in which they apply."""
    kept = (KeptMomentum,) if config.train.keep_momentum else ()
    units = (AdaptiveClipping,) if adaptive_clip(config) else ()
    clipped = (ClippedUpdate,) if config.privacy.mechanism.startswith("client_") else ()
    return *kept, client_half(config.strategy.name), *units, *clipped


def local_rules(
    config: ExperimentConfig,
    told: Mapping[str, Any],
    given: Mapping[str, Tensor],
    model: nn.Module | None = None,
) -> tuple[LocalRule, ...]:
    """Return the rules of a round, by what the server's message tells and gives (`LocalRule.of`).

    With a `model`, for its parameters (`LocalRule.on`).

    Raises:
        UserError: what one of them needs is not there.
    """
    rules = (rule.of(told, given) for rule in rule_types(config))
    return tuple(rule if model is None else rule.on(config, model) for rule in rules)


def keeps_model(config: ExperimentConfig) -> bool:
    """Whether every client keeps a whole model of its own, on which it is to be judged."""
    return any(rule.keeps_model for rule in rule_types(config))


def federation_rule(
    config: ExperimentConfig, normalizer: Normalizer, model: nn.Module, round_: int = 1
) -> FederationRule:
    """Return the role of every tensor of `model`: the normalizer's, but local where it stays.

    Raises:
        UserError: as `Normalizer.federation_rule` and `LocalRule.stays`.
    """
    rule = normalizer.federation_rule(model, round_)
    stays = client_half(config.strategy.name).stays(config, model)
    if not stays:
        return rule
    roles = {
        name: TensorRole.LOCAL if name in stays and role is TensorRole.SHARED else role
        for name, role in rule.items()
    }
    return replace(rule, roles=roles)


def _is_rule(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, LocalRule)
