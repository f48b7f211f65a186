"""Norms of a class that normalizes and then calls parts of its own, as an activation: taken apart.

timm writes most of its networks with such norms (``BatchNormAct2d``: BatchNorm, dropout and
activation in one layer). Apart, the norm is one of torch's, and can be exchanged as any other.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from fedkn.models.hooks import move_hooks, tied_down
from fedkn.models.layouts import Norm, channels_of, computes, torch_class

__all__ = ["split"]


def split(norm: nn.Module) -> nn.Sequential | None:
    """Return torch's norm with the tensors and hooks of `norm`, and behind it the parts of `norm`.

    None where its class does not compute just that, which is tried on numbers in evaluation, and
    where something is tied to the norm that two layers could not bear. `norm` itself is left as it
    is, and shares its tensors and parts with what is returned. The parts keep their names.
    """
    base = torch_class(norm)
    parts = dict(norm.named_children())
    inner = [module for part in parts.values() for module in part.modules()]
    if type(norm) is base or isinstance(norm, nn.LayerNorm) or not parts or tied_down(norm):
        return None
    if any(isinstance(module, Norm | nn.modules.conv._ConvNd) for module in inner):
        return None

    def by_hand(twin: Any, maps: Tensor) -> Tensor:
        out: Tensor = base.forward(twin, maps)
        for part in twin.children():
            out = part(out)
        return out

    if not computes(norm, channels_of(norm, "maps"), by_hand):
        return None
    plain = base.__new__(base)
    nn.Module.__init__(plain)
    made = {name: value for name, value in vars(norm).items() if name not in vars(plain)}
    vars(plain).update(made)
    plain._parameters.update(norm._parameters)
    plain._buffers.update(norm._buffers)
    plain._non_persistent_buffers_set.update(norm._non_persistent_buffers_set)
    name = "norm"
    while name in parts:
        name += "_"
    whole = nn.Sequential(OrderedDict({name: plain, **parts}))
    whole.training = plain.training = norm.training
    move_hooks(norm, whole)
    return whole
