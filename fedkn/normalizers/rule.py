"""The federation rule: what becomes of every tensor of a model in a round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from torch import nn

from fedkn.errors import UserError
from fedkn.normalizers.frozen import is_fixed

__all__ = ["Federated", "FederationRule", "Forward", "TensorRole"]

Forward = Callable[[int], None]


class TensorRole(StrEnum):
    """What becomes of one tensor of the model in a round."""

    SHARED = "shared"
    """Sent to the clients, sent back, averaged."""
    LOCAL = "local"
    """Never leaves the client; kept there between rounds."""
    FROZEN = "frozen"
    """Sent to the clients as the server holds it; what clients make of it is ignored."""
    MEAN = "mean"
    """A client's mean: sent, sent back, pooled with its module's VARIANCE, which there must be."""
    VARIANCE = "variance"
    """A client's biased variance about that mean: pooled by the law of total variance."""
    COUNTER = "counter"
    """An integer count: never averaged; the server's value stays as it is."""
    FIXED = "fixed"
    """Never sent and never changed: every machine builds it as it is (``model.frozen``)."""


@dataclass(frozen=True, eq=False)
class FederationRule(Mapping[str, TensorRole]):
    """The role of every tensor of a model in one round, by name, in the order of its state."""

    roles: Mapping[str, TensorRole]
    pooling_weight: float = 1.0
    """Weight of the round's pooled means and variances against those that the server holds, above
    0 and at most 1: they replace."""

    def __getitem__(self, tensor: str) -> TensorRole:
        return self.roles[tensor]

    def __iter__(self) -> Iterator[str]:
        return iter(self.roles)

    def __len__(self) -> int:
        return len(self.roles)


class Federated:
    """What a normalizer's layers do in a round, on the client and between clients.

    By itself: every parameter is averaged, and there are no buffers.
    """

    name: ClassVar[str]
    """Its name in the registry, in configurations and reports."""

    def role_of(self, module: nn.Module, tensor: str, round: int) -> TensorRole | None:
        """Return the role of a tensor of a layer that this normalizer owns, else None.

        `module` owns the parameter or buffer named `tensor` directly. Decide by the module's type,
        never by its name. `round` counts from 1, for rules that change in the course of a run.
        """
        del module, tensor, round
        return None

    def federation_rule(self, model: nn.Module, round: int = 1) -> FederationRule:
        """Return the role of every tensor of `model`, in the order of its ``state_dict``.

        Parameters of which the normalizer says nothing are shared, and those that are not trained
        (``requires_grad``) are fixed, as are buffers that were frozen. Raises UserError for a
        buffer of which it says nothing: whether one may be averaged cannot be guessed.
        """
        roles: dict[str, TensorRole] = {}
        for module, name, tensor, is_buffer in _tensors(model):
            if is_fixed(module, tensor):
                roles[name] = TensorRole.FIXED
                continue
            role = self.role_of(module, tensor, round)
            if role is None and is_buffer:
                raise UserError(
                    f"the '{self.name}' normalizer has no federation rule for buffer '{name}' of "
                    f"{type(module).__name__}: build or convert the model with the normalizer "
                    f"that owns this layer, leave it as it is by model.frozen = '{name}', or "
                    "register the buffer with persistent=False"
                )
            roles[name] = TensorRole.SHARED if role is None else role
        keys = list(model.state_dict())
        if list(roles) != keys:
            odd = sorted(set(keys).symmetric_difference(roles))
            raise UserError(
                f"no federation rule covers {', '.join(odd)}: only parameters and persistent "
                "buffers of modules can be federated, not extra state"
            )
        return FederationRule(roles)

    def begin_training(self, model: nn.Module, round: int) -> None:
        """Prepare the layers of `model` for a client's local training in `round`.

        Called when the tensors are loaded and the model is in training mode.
        """
        del model, round

    def end_training(self, model: nn.Module, forward: Forward, round: int) -> None:
        """Complete the tensors that the client sends, after its last local step of `round`.

        ``forward(batch_size)`` sends all of the client's training images through the model once,
        in their order, scaled but not augmented, without gradients, in the mode in which the
        model's layers are: for statistics that need a pass of their own.
        """
        del model, forward, round


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, bool]]:
    # Modules and tensors that are shared come under each of their names, as in a state_dict.
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                yield module, dot + tensor, tensor, False
        for tensor, buffer in module._buffers.items():
            if buffer is not None and tensor not in module._non_persistent_buffers_set:
                yield module, dot + tensor, tensor, True
