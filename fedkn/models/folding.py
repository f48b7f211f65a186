"""`fold_batch_norm`: batch norms merged into the convolutions before them, for inference."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkn.errors import UserError
from fedkn.models.conversion import Change, Conversion, Kept, copied, swap
from fedkn.models.wiring import (
    COMPUTED_WEIGHT,
    UNUSABLE,
    NormSite,
    computes_its_weight,
    read_wiring,
)

__all__ = ["fold_batch_norm"]


def fold_batch_norm(module: nn.Module) -> tuple[nn.Module, Conversion]:
    """Return a copy of `module` in evaluation mode without the batch norms that follow a
    convolution, and what was changed. Its outputs are those of ``module.eval()``.

    A convolution w, b followed by a batch norm with mean mu, variance var, scale gamma and bias
    beta becomes ``w * gamma / sqrt(var + eps)`` and ``(b - mu) * gamma / sqrt(var + eps) + beta``.
    Batch norms elsewhere (before a convolution, after a concatenation) stay.

    Raises UserError where the model's data flow cannot be traced: the order of modules is no
    proof that a batch norm reads a convolution, and a wrong guess would change the outputs.
    """
    model = copied(module).eval()
    wiring = read_wiring(model)
    if not wiring.traced:
        raise UserError(
            f"{type(module).__name__} cannot be traced by torch.fx, so its batch norms cannot be "
            "folded safely: trace a wrapper whose forward takes tensors and has no data-dependent "
            "branches"
        )
    modules = dict(model.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    changed: list[Change] = []
    kept: list[Kept] = []
    for site in wiring.sites:
        norm = modules[site.name]
        if not isinstance(norm, _BatchNorm):
            continue
        conv = modules.get(site.before or "")
        problem = _problem(site, norm, conv)
        if problem is not None:
            kept.append(Kept(site.name, type(norm).__name__, problem))
            continue
        assert isinstance(conv, nn.Conv2d)
        _fold(conv, norm)
        replacements[norm] = nn.Identity().eval()
        changed.append(Change(site.name, type(norm).__name__, f"folded into {site.before}"))
    return swap(model, replacements), Conversion(tuple(changed), tuple(kept), wiring.traced)


def _problem(site: NormSite, norm: _BatchNorm, conv: nn.Module | None) -> str | None:
    if site.layout == "own":
        return UNUSABLE[site.layout]
    if site.before is None:
        return "no convolution stands right before it"
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} cannot take it over"
    if computes_its_weight(conv):
        return f"the convolution's {COMPUTED_WEIGHT}"
    if norm.running_mean is None:
        return "it has no running statistics"
    return None


def _fold(conv: nn.Conv2d, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        # In float64, so that folding adds no rounding of its own beyond the final one.
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        bias = -norm.running_mean.double()
        if conv.bias is not None:
            bias = bias + conv.bias.double()
        bias = bias * scale
        if norm.bias is not None:
            bias = bias + norm.bias.double()
        weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
        # New parameters: the old ones may be shared with a convolution that has another norm.
        conv.weight = nn.Parameter(weight.to(conv.weight.dtype), conv.weight.requires_grad)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)
