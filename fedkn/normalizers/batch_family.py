"""What the normalizers have in common whose layer is PyTorch's BatchNorm."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.rule import TensorRole

__all__ = ["BatchNormFamily"]


class BatchNormFamily(Normalizer):
    """BatchNorm as PyTorch has it; the members differ in their federation rule alone.

    Its layers are known by their type, so those of networks from elsewhere (torchvision's
    ``downsample.1``, ``features.0.1``) fall under the rule as well, whatever their name.
    """

    affine: ClassVar[bool] = True
    minimum_batch: ClassVar[int] = 2
    together: ClassVar[bool] = False
    mixes_examples: ClassVar[bool] = True

    def norm(self, channels: int) -> nn.Module:
        """Return BatchNorm2d as PyTorch configures it: eps 1e-5, momentum 0.1, running means."""
        return nn.BatchNorm2d(channels)

    def role_of(self, module: nn.Module, tensor: str, round: int) -> TensorRole | None:
        """Return the member's role for BatchNorm's parameters and statistics; a counter's own."""
        if not isinstance(module, _BatchNorm):
            return None
        if tensor == "num_batches_tracked":
            return TensorRole.COUNTER
        if tensor in ("running_mean", "running_var"):
            return self._statistic_role(tensor, round)
        return self._parameter_role(round)

    @abstractmethod
    def _parameter_role(self, round: int) -> TensorRole:
        """Return the role of weight and bias."""

    @abstractmethod
    def _statistic_role(self, tensor: str, round: int) -> TensorRole:
        """Return the role of ``running_mean`` or ``running_var``."""
