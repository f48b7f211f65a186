"""Filter Response Normalization with its own activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.errors import UserError
from fedkn.layers import FilterResponseNorm2d
from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.factory import activation_layer

__all__ = ["FilterResponseNormalizer"]


@dataclass(frozen=True)
class FilterResponseNormalizer(Normalizer):
    """FRN with TLU: ``max(gamma * x / sqrt(mean(x^2) + eps) + beta, tau)``, the mean over pixels.

    The thresholded linear unit is its activation: it takes the place of whatever activation the
    network asks for, ReLU or Mish alike. Where a norm stands without an activation (the end of a
    residual branch, the final norm) it is FRN without the threshold; an activation that follows an
    addition or the final norm is the network's own.

    Option: `learn_eps`, as the paper has it for 1x1 maps; which maps shrink to that is not known
    when a layer is made, so every layer learns its eps. Without it (eps 1e-6) a 1x1 map is refused
    in training.

    Federation rule: gamma, beta, tau and the learned eps are shared.
    """

    name: ClassVar[str] = "frn"
    title: ClassVar[str] = "FilterResponseNorm + TLU"
    paper: ClassVar[str] = "Singh & Krishnan, CVPR 2020, arXiv 1911.09737"
    statistics: ClassVar[str] = "all pixels, per image and channel; not centred"
    not_for: ClassVar[str] = (
        "Networks whose own activation matters, which TLU replaces, and small maps, because "
        "little more than the sign is left of a 1x1 map; its mean is below that of ws_group in "
        "every column of docs/early-training.md."
    )
    affine: ClassVar[bool] = True

    learn_eps: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.learn_eps, bool):
            raise UserError(
                f"learn_eps = {self.learn_eps!r} of normalizer 'frn' must be true or false"
            )

    @property
    def label(self) -> str:
        """Title, and that eps is fixed where it is."""
        return self.title if self.learn_eps else f"{self.title} (fixed eps)"

    def norm(self, channels: int) -> nn.Module:
        """Return FilterResponseNorm2d without its threshold."""
        return FilterResponseNorm2d(channels, threshold=False, learn_eps=self.learn_eps)

    def _norm_act(self, channels: int, activation: str | None) -> dict[str, nn.Module | None]:
        """Return FRN (``norm``), with TLU for any `activation`."""
        threshold = activation_layer(activation) is not None  # refuses an unknown name
        norm = FilterResponseNorm2d(channels, threshold=threshold, learn_eps=self.learn_eps)
        return {"norm": norm}
