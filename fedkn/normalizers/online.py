"""Online normalization: the images of a client as a stream, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.errors import UserError
from fedkn.layers import OnlineNorm2d
from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.pooled import moment_role
from fedkn.normalizers.rule import TensorRole

__all__ = ["OnlineNormalizer"]


@dataclass(frozen=True)
class OnlineNormalizer(Normalizer):
    """Online Normalization: each image is normalized by what those before it left.

    Exponentially decaying statistics forward, a control process backward that keeps the gradient
    unbiased in the long run, then layer scaling. No batch is needed: images of one batch come one
    after another too.

    Options: `forward_decay` and `backward_decay`, the paper's 0.999 and 0.99 for ImageNet.

    Federation rule: parameters and control values are shared and averaged, the statistics pooled
    by the law of total variance (the paper is not about federations).
    """

    name: ClassVar[str] = "online"
    title: ClassVar[str] = "Online Norm"
    paper: ClassVar[str] = "Chiley et al., NeurIPS 2019, arXiv 1905.05894, Eq. 8-11"
    statistics: ClassVar[str] = "earlier images and all pixels, per channel; the whole image"
    not_for: ClassVar[str] = (
        "Short streams: statistics and control values remember a thousand and a hundred images, "
        "more than many clients hold; large batches, of which every image takes a turn of its own; "
        "DP-SGD, which needs gradients of single examples."
    )
    affine: ClassVar[bool] = True
    together: ClassVar[bool] = False
    mixes_examples: ClassVar[bool] = True

    forward_decay: float = 0.999
    backward_decay: float = 0.99

    def __post_init__(self) -> None:
        for option in ("forward_decay", "backward_decay"):
            if not 0 <= getattr(self, option) < 1:
                raise UserError(
                    f"{option} = {getattr(self, option)!r} of normalizer 'online' must be at least "
                    "0 and below 1"
                )

    @property
    def label(self) -> str:
        """Title and decays."""
        return f"{self.title} (decays {self.forward_decay:g}, {self.backward_decay:g})"

    def norm(self, channels: int) -> nn.Module:
        """Return OnlineNorm2d."""
        return OnlineNorm2d(
            channels, forward_decay=self.forward_decay, backward_decay=self.backward_decay
        )

    def role_of(self, module: nn.Module, tensor: str, round: int) -> TensorRole | None:
        """Share parameters and control values, pool the statistics."""
        del round
        return moment_role(tensor) if isinstance(module, OnlineNorm2d) else None
