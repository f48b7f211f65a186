"""`fold_batch_norm`: batch norms merged into the convolutions before them, for inference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkn.errors import UserError
from fedkn.models.changes import Change, Conversion, Kept
from fedkn.models.conversion import swap
from fedkn.models.copying import copied, lazy_layer
from fedkn.models.hooks import tied_down, watched
from fedkn.models.layouts import UNUSABLE
from fedkn.models.same_outputs import Comparison
from fedkn.models.wiring import COMPUTED_WEIGHT, NormSite, Wiring, computes_its_weight, read_wiring

__all__ = ["fold_batch_norm"]


def fold_batch_norm(
    module: nn.Module, example_input: Tensor | Sequence[Tensor] | None = None
) -> tuple[nn.Module, Conversion]:
    """Return a copy of `module` in evaluation mode without the batch norms that follow a
    convolution, and what was changed. Its outputs are those of ``module.eval()``.

    A convolution w, b followed by a batch norm with mean mu, variance var, scale gamma and bias
    beta becomes ``w * gamma / sqrt(var + eps)`` and ``(b - mu) * gamma / sqrt(var + eps) + beta``.

    A batch norm is folded where the data flow shows that it alone reads a convolution, and nothing
    else reads the tensors of either or watches them by hooks; what is left is named with the
    reason. Then model and copy are run in float64 and compared: where the outputs are not the same,
    the batch norms to blame stay as well.

    Args:
        module: any model whose data flow torch.fx can trace; it is left alone.
        example_input: what its forward takes, one tensor or several; None: noise of sizes that are
            tried until one fits. A model on the "meta" device has no numbers to compare.

    Raises UserError where the data flow cannot be traced: the order of modules is no proof that a
    batch norm reads a convolution. Also where no input is given and none that is tried fits, where
    layers are lazy, and where the model cannot be copied.
    """
    if (lazy := lazy_layer(module)) is not None:
        raise UserError(f"'{lazy}' of the model has no shape yet: send a batch through it first")
    model = copied(module).eval()
    wiring = read_wiring(model)
    if not wiring.traced:
        raise UserError(
            f"{type(module).__name__} cannot be traced by torch.fx, so its batch norms cannot be "
            "folded safely: trace a wrapper whose forward takes tensors and has no data-dependent "
            "branches"
        )
    modules, originals = dict(model.named_modules()), dict(module.named_modules())
    pairs: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for site in wiring.sites:
        norm = modules[site.name]
        if not isinstance(norm, _BatchNorm):
            continue
        conv = site.before or ""
        # Hooks are looked for in the original.
        near = originals[site.name], originals.get(conv)
        reason = _problem(site, norm, modules.get(conv), wiring) or _watchers(*near, conv)
        if reason:
            reasons[site.name] = reason
        else:
            pairs[site.name] = conv
    if pairs:
        blamed = _to_blame(Comparison(model, example_input), pairs)
        reasons |= blamed
        pairs = {name: conv for name, conv in pairs.items() if name not in blamed}
    changed = tuple(
        Change(name, type(modules[name]).__name__, f"folded into {conv}")
        for name, conv in pairs.items()
    )
    kept = tuple(Kept(name, type(modules[name]).__name__, why) for name, why in reasons.items())
    return _folded(model, pairs.items()), Conversion(changed, kept, wiring.traced)


def _problem(site: NormSite, norm: _BatchNorm, conv: nn.Module | None, wiring: Wiring) -> str:
    """Return why a batch norm cannot be folded; empty if nothing that is known speaks against."""
    if site.before is None or conv is None:
        return _unusable(site) or site.alone
    reasons = {
        _unusable(site): bool(_unusable(site)),
        f"the convolution's {COMPUTED_WEIGHT}": computes_its_weight(conv),
        tied_down(norm): bool(tied_down(norm)),
        f"of the convolution '{site.before}': {tied_down(conv)}": bool(tied_down(conv)),
        f"{type(conv).__name__} cannot take it over": type(conv) is not nn.Conv2d,
        "it has no running statistics": norm.running_mean is None or norm.running_var is None,
        "it stays in training mode, also after model.eval()": norm.training,
    }
    for name in (site.name, site.before):
        reasons[f"the model's own code reads tensors of '{name}' itself"] = name in wiring.read
    return next((reason for reason, holds in reasons.items() if holds), "")


def _watchers(norm: nn.Module, conv: nn.Module | None, name: str) -> str:
    assert conv is not None
    for what, where in ((norm, ""), (conv, f"of the convolution '{name}': ")):
        if reason := watched(what):
            return where + reason
    return ""


def _to_blame(comparison: Comparison, pairs: dict[str, str]) -> dict[str, str]:
    """Return those of `pairs`, by their norm, without which folding changes no output, and why."""
    if comparison.same(_folded(comparison.model, pairs.items())):
        return {}
    blamed = {
        name: f"outputs change when it is folded into '{conv}'"
        for name, conv in pairs.items()
        if not comparison.same(_folded(comparison.model, [(name, conv)]))
    }
    rest = [pair for pair in pairs.items() if pair[0] not in blamed]
    if not comparison.same(_folded(comparison.model, rest)):
        blamed |= {
            name: "outputs change when it is folded together with others" for name, _ in rest
        }
    return blamed


def _folded(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> nn.Module:
    """Return a copy of `model` in which each norm, by name, is folded into its convolution."""
    twin = copied(model)
    modules = dict(twin.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    for name, before in pairs:
        norm, conv = modules[name], modules[before]
        assert isinstance(norm, _BatchNorm)
        assert isinstance(conv, nn.Conv2d)
        _fold(conv, norm)
        replacements[norm] = nn.Identity().eval()
    return swap(twin, replacements)


def _unusable(site: NormSite) -> str:
    if site.layout in ("series", "volumes", "features"):
        return UNUSABLE["other"]
    return UNUSABLE.get(site.layout, "")


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
