"""FedPer, the client half: the last layers of the network stay on the client.

Arivazhagan et al., "Federated Learning with Personalization Layers", 2019, arXiv 1912.00818,
Algorithm 1: base layers are averaged, personalization layers are trained with them by each client
and never sent. The server half (`server/strategies/fedper.py`) is FedAvg's.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.models.head import head_parameters
from fedkn.training.rule import LocalRule

__all__ = ["FedPer", "personal_parameters"]


@dataclass(frozen=True)
class FedPer(LocalRule):
    """Local SGD on all layers; those of `personal_parameters` are not sent, and kept."""

    @classmethod
    def stays(cls, config: ExperimentConfig, model: nn.Module) -> frozenset[str]:
        """Return the parameters of the personalization layers."""
        return personal_parameters(config, model)


def personal_parameters(config: ExperimentConfig, model: nn.Module) -> frozenset[str]:
    """Return which parameters of `model` stay on the client.

    Those that a pattern of ``strategy.local_parameters`` matches (shell patterns of their names or
    of the layers that they are in, divided by commas); by default the last linear layer's.

    Raises:
        UserError: a pattern matches nothing, all parameters would stay, or there is no such layer.
    """
    patterns = [p for p in map(str.strip, config.strategy.local_parameters.split(",")) if p]
    every = [name for name, _ in model.named_parameters()]
    if not patterns:
        if not (head := head_parameters(model)):
            raise UserError(
                f"{config.strategy.name} keeps the last linear layer on the clients, and model "
                f"'{config.model.name}' has none: name others in strategy.local_parameters"
            )
        return frozenset(head)
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in every if _matches(name, pattern)}
        if not matching:
            raise UserError(
                f"strategy.local_parameters: nothing in model '{config.model.name}' is called "
                f"'{pattern}' (it has {', '.join(every[:3])}, …, {every[-1]})"
            )
        found |= matching
    if len(found) == len(every):
        raise UserError("strategy.local_parameters leaves nothing to share: name fewer parameters")
    return frozenset(found)


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


RULE = FedPer
