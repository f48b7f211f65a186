"""Proxy normalization: GroupNorm, and an activation normalized by a Gaussian in its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedkn.layers import ProxyNorm2d
from fedkn.normalizers.factory import activation_layer
from fedkn.normalizers.group import GroupNormalizer

__all__ = ["ProxyNormalizer"]


@dataclass(frozen=True)
class ProxyNormalizer(GroupNormalizer):
    """GroupNorm without its scale and bias, then the proxy-normalized activation, which has them.

    Where a norm stands without an activation (the end of a residual branch, the final norm) it is
    GroupNorm. Options as for `GroupNormalizer`, and the same default, so that the two differ in the
    activation and not in the groups; the paper proxy-normalizes LayerNorm and GroupNorm.

    Federation rule: all four vectors of a layer are shared.
    """

    name: ClassVar[str] = "proxy"
    title: ClassVar[str] = "Proxy Norm + GroupNorm"
    paper: ClassVar[str] = "Labatie et al., NeurIPS 2021, arXiv 2106.03743, Sec. 5"
    not_for: ClassVar[str] = (
        "Narrow layers and small maps, on which 256 numbers of the proxy cost more than the map; "
        "converted networks, whose activations stay their own, so that it is GroupNorm there."
    )

    def _norm_act(self, channels: int, activation: str | None) -> dict[str, nn.Module | None]:
        """Return GroupNorm (``norm``) and the proxy-normalized `activation`."""
        function = activation_layer(activation)
        if function is None:
            return {"norm": self.norm(channels)}
        norm = nn.GroupNorm(self.group_count(channels), channels, affine=False)
        return {"norm": norm, "activation": ProxyNorm2d(channels, function)}
