"""Adaptive gradient clipping: no unit of a layer is moved by more than a part of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from fedkn import normalizers
from fedkn.config import ExperimentConfig
from fedkn.models.head import head_parameters
from fedkn.training.rule import LocalRule

__all__ = ["AdaptiveClipping", "adaptive_clip"]

_EPS = 1e-3
"""The least that a unit's weights count for, so that those at zero can leave it (their eps)."""


@dataclass(frozen=True)
class AdaptiveClipping(LocalRule):
    """Clips the gradient G of every unit, of weights W (Brock et al., arXiv 2102.06171, eq. 3).

        G <- factor max(|W|, 1e-3) / |G| G    where |G| / max(|W|, 1e-3) > factor

    Norms are Euclidean. A unit is an output channel of a convolution or linear layer; vectors
    (biases, gains) are one unit each, as in the authors' code. It belongs to no strategy and goes
    with any: ``train.adaptive_clip``.

    Attributes:
        but: parameters that it leaves alone: those of the last linear layer (there, Sec. 4.1).
    """

    factor: float = 0.0
    but: frozenset[str] = frozenset()

    def on(self, config: ExperimentConfig, model: nn.Module) -> Self:
        """Return the rule with the factor of `config`, for all of `model` but its head."""
        but = frozenset(head_parameters(model))
        return replace(self, factor=adaptive_clip(config), but=but)

    @property
    def acts(self) -> bool:
        """Whether it clips at all."""
        return self.factor != 0

    def limit(
        self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, stacked: bool
    ) -> None:
        """Clip every unit."""
        for name, gradient in gradients.items():
            if name in self.but:
                continue
            weights = _norms(values[name], stacked).clamp_(min=_EPS)
            # So small a gradient is not clipped by any factor that clips at all.
            own = _norms(gradient, stacked).clamp_(min=1e-9)
            gradient.mul_(weights.mul_(self.factor).div_(own).clamp_(max=1.0))


def adaptive_clip(config: ExperimentConfig) -> float:
    """Return to what part of its weights each unit's gradient is clipped; 0: it is not."""
    asked = config.train.adaptive_clip
    if asked == "published":
        return normalizers.create(config.normalizer.name).adaptive_clip
    return float(asked)


def _norms(tensor: Tensor, stacked: bool) -> Tensor:
    """Return the norm of every unit, in a shape that the tensor's can be multiplied by."""
    own = tensor.dim() - stacked
    first = stacked + (own > 1)
    axes = tuple(range(first, tensor.dim()))
    return torch.linalg.vector_norm(tensor, dim=axes, keepdim=True) if axes else tensor.abs()
