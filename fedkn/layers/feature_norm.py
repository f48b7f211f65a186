"""Normalization of feature vectors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.errors import UserError

__all__ = ["FeatureNorm"]


class FeatureNorm(nn.Module):
    """Scale each feature vector f of d numbers to ``sqrt(d) f / ||f||`` (arXiv 2308.09565).

    The norm is taken as 1e-12 at least; an eps as large as those of the other layers would show,
    because the features of a network that normalizes nothing else can be tiny. Nothing is learned.
    Raises UserError in training for d = 1, where only the sign would be left.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, d) to the same shape."""
        if self.training and features.shape[1] == 1:
            raise UserError("FeatureNorm erases vectors of one feature: use a wider model")
        unit: Tensor = F.normalize(features, dim=1)
        return unit * float(features.shape[1] ** 0.5)
