"""Feature normalization: nothing but the features before the head is normalized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import FeatureNorm
from fedkn.normalizers.none import NoNormalizer

__all__ = ["FeatureNormalizer"]


@dataclass(frozen=True)
class FeatureNormalizer(NoNormalizer):
    """Plain convolutions, and features f of d numbers scaled to ``sqrt(d) f / ||f||``.

    It stands between the last pooling and the linear layer, whatever `final_norm` is. Against label
    skew it is most of what LayerNorm does, says the paper. Networks from elsewhere have no place
    for it that fedkn could know, so conversion gives them plain convolutions alone.

    Federation rule: all parameters are shared; the layer itself has none.
    """

    name: ClassVar[str] = "feature_norm"
    title: ClassVar[str] = "feature normalization"
    paper: ClassVar[str] = (
        "Zhang et al., 2023, arXiv 2308.09565; Kim et al., 2023, arXiv 2311.13267"
    )
    statistics: ClassVar[str] = "the features of an image"
    not_for: ClassVar[str] = (
        "Whatever plain convolutions cannot learn, because no map inside the network is "
        "normalized: it is in the lower half of every column of docs/early-training.md, with two "
        "labels a client as well, which its papers are about."
    )
    affine: ClassVar[bool] = False

    def before_head(self) -> nn.Module:
        """Return FeatureNorm."""
        return FeatureNorm()
