"""Ghost batch normalization: BatchNorm of parts of the local batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.errors import UserError
from fedkn.layers import GhostBatchNorm2d
from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.rule import TensorRole

__all__ = ["GhostBatchNormalizer"]


@dataclass(frozen=True)
class GhostBatchNormalizer(Normalizer):
    """Ghost BatchNorm: a batch is normalized in parts of `ghost_size` images, each by itself.

    Option: `ghost_size`, 2 or more. The paper's ghost batches are of 16 to 256 out of thousands;
    the default is 2, because local batches are small here. Evaluation is on running statistics.

    Federation rule: everything is shared and averaged, as under ``batch``.
    """

    name: ClassVar[str] = "ghost"
    title: ClassVar[str] = "Ghost BatchNorm"
    paper: ClassVar[str] = "Hoffer et al., NeurIPS 2017, arXiv 1705.08741, Algorithm 1"
    statistics: ClassVar[str] = "a part of the batch and all pixels, per channel"
    not_for: ClassVar[str] = (
        "Tiny local batches: up to one image more than `ghost_size` it is BatchNorm, and it does "
        "not train on one; it is a regularizer for large batches; DP-SGD, which needs gradients "
        "of single examples."
    )
    affine: ClassVar[bool] = True
    minimum_batch: ClassVar[int] = 2
    together: ClassVar[bool] = False
    mixes_examples: ClassVar[bool] = True

    ghost_size: int = 2

    def __post_init__(self) -> None:
        if type(self.ghost_size) is not int or self.ghost_size < 2:
            raise UserError(
                f"ghost_size = {self.ghost_size!r} of normalizer 'ghost' must be a whole number, "
                "2 or more"
            )

    @property
    def label(self) -> str:
        """Title and size."""
        return f"{self.title} (of {self.ghost_size})"

    def norm(self, channels: int) -> nn.Module:
        """Return GhostBatchNorm2d."""
        return GhostBatchNorm2d(channels, self.ghost_size)

    def role_of(self, module: nn.Module, tensor: str, round: int) -> TensorRole | None:
        """Share weight, bias and running statistics."""
        del tensor, round
        return TensorRole.SHARED if isinstance(module, GhostBatchNorm2d) else None
