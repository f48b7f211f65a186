"""`convert`: another normalizer in any torch model, its convolutions' weights kept."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkn.errors import UserError
from fedkn.layers import KernelNorm2d, KNConv2d, WSConv2d
from fedkn.layers.kernel.padding import PADDING_MODES
from fedkn.models.wiring import (
    COMPUTED_WEIGHT,
    UNUSABLE,
    Conv,
    NormSite,
    Wiring,
    computes_its_weight,
    norm_channels,
    read_wiring,
)
from fedkn.normalizers import Normalizer

__all__ = ["Change", "Conversion", "Kept", "convert", "copied", "swap"]


@dataclass(frozen=True)
class Change:
    """A layer that was replaced: its path, what it was and what it is now."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Kept:
    """A layer that was left as it is, and why."""

    name: str
    layer: str
    reason: str


@dataclass(frozen=True)
class Conversion:
    """What a conversion changed and what it did not; `str` gives one line for each.

    `traced` says whether neighbours were found in the data flow (torch.fx) or, where the model
    cannot be traced, by the order of its modules: then look at the lines.
    """

    changed: tuple[Change, ...]
    kept: tuple[Kept, ...]
    traced: bool

    def __str__(self) -> str:
        found = "data flow" if self.traced else "order of modules (the model cannot be traced)"
        lines = [f"{len(self.changed)} changed, {len(self.kept)} kept; read from the {found}"]
        lines += [f"changed {c.name}: {c.before} -> {c.after}" for c in self.changed]
        lines += [f"kept {k.name}: {k.layer}: {k.reason}" for k in self.kept]
        return "\n".join(lines)


class ChannelsLast(nn.Module):
    """A norm for (N, C, H, W), applied to (N, H, W, C)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, H, W, C)."""
        out: Tensor = self.norm(x.permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1)


class Copy(nn.Module):
    """The identity, as a copy: for a place where the model then writes into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a copy of `x`."""
        return x.clone()


def convert(module: nn.Module, normalizer: Normalizer) -> tuple[nn.Module, Conversion]:
    """Return a copy of `module` in which `normalizer` does the normalizing, and what was changed.

    Each BatchNorm, GroupNorm, InstanceNorm or LayerNorm over image maps becomes the normalizer's
    own; scales and biases are taken over where the new norm has them. Convolutions beside a norm
    become the normalizer's, with the weights they had. For KernelNorm these are KNConvs, and a norm
    with a convolution right before it or (through an activation) right after it disappears into
    it; one that stands alone becomes a KernelNorm 1x1. A convolution gains a bias of zero where
    it lost the norm that had one. A pretrained network needs training again after conversion.

    Raises UserError where the normalizer does not fit, such as groups that do not divide, and where
    the model cannot be copied.
    """
    model = copied(module)
    return _Converter(model, normalizer).run(read_wiring(model))


def copied(module: nn.Module) -> nn.Module:
    """Return a deep copy of `module`.

    Raises UserError where torch cannot copy it, as after a pass through an old weight norm.
    """
    try:
        return copy.deepcopy(module)
    except RuntimeError as error:
        raise UserError(
            f"{type(module).__name__} cannot be copied ({str(error).splitlines()[0]}): take away "
            "what computes its weights first, as torch.nn.utils.remove_weight_norm or "
            "remove_spectral_norm does"
        ) from error


def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each replacement in every place of its original, in `model` itself; return the model."""
    for parent in list(model.modules()):
        # Not named_children, which lists a module that stands in two places once.
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)


class _Converter:
    def __init__(self, model: nn.Module, normalizer: Normalizer) -> None:
        self.model = model
        self.normalizer = normalizer
        self.modules = dict(model.named_modules())
        self.replacements: dict[nn.Module, nn.Module] = {}
        self.changed: list[Change] = []
        self.kept: list[Kept] = []

    def run(self, wiring: Wiring) -> tuple[nn.Module, Conversion]:
        usable = [site for site in wiring.sites if site.layout not in UNUSABLE]
        beside = {conv for site in usable for conv in (site.before, *site.after) if conv}
        for name in wiring.convolutions:
            self._convolution(name, name in beside)
        for site in wiring.sites:
            self._norm(site)
        for name in wiring.strangers:
            self._keep(name, "its class is not known: if it normalizes, replace it by hand")
        self.kept += [
            Kept(name, type(m).__name__, "it is kernel-normalized already")
            for name, m in self.modules.items()
            if isinstance(m, KernelNorm2d)
        ]
        model = swap(self.model, self.replacements)
        return model, Conversion(tuple(self.changed), tuple(self.kept), wiring.traced)

    def _convolution(self, name: str, beside_norm: bool) -> None:
        conv = self.modules[name]
        if isinstance(conv, KNConv2d):
            self._keep(name, "it is kernel-normalized already: build the model anew")
            return
        assert isinstance(conv, nn.Conv2d)
        new = self._like(conv)
        core = new if isinstance(new, Conv) else new.get_submodule("conv")
        assert isinstance(core, Conv)
        if type(core) is type(conv):
            if beside_norm and core.bias is not None and conv.bias is None:
                conv.bias = _zeros(conv)
                self.changed.append(Change(name, "without bias", "with a bias of zero"))
            return
        problem = _problem(conv, core, beside_norm)
        if problem:
            self._keep(name, problem)
            return
        # The parameters themselves, so that tied weights stay tied.
        if conv.bias is not None:
            core.bias = conv.bias
        elif core.bias is not None:
            core.bias = _zeros(conv)
        core.weight = conv.weight
        if isinstance(core, KNConv2d):
            core.padding_mode = conv.padding_mode
        self._replace(name, new)

    def _like(self, conv: nn.Conv2d) -> nn.Module:
        # Four sides, which is the only form that also says what padding="same" comes to.
        left, right, top, bottom = conv._reversed_padding_repeated_twice
        return self.normalizer.conv(
            conv.in_channels,
            conv.out_channels,
            _pair(conv.kernel_size),
            then_norm=True,
            stride=_pair(conv.stride),
            padding=(left, right, top, bottom),
            dilation=_pair(conv.dilation),
            groups=conv.groups,
        )

    def _norm(self, site: NormSite) -> None:
        norm = self.modules[site.name]
        if site.layout in UNUSABLE:
            self._keep(site.name, UNUSABLE[site.layout])
            return
        new = self.normalizer.norm(norm_channels(norm))
        if self._absorbed(site) or isinstance(new, nn.Identity):
            self._replace(site.name, self._nothing(site))
            return
        if _same_kind(norm, new):
            self._keep(site.name, f"it is the '{self.normalizer.name}' normalizer's already")
            return
        like = next(norm.parameters(), next(self.model.parameters(), None))
        if like is not None:
            new.to(device=like.device, dtype=like.dtype)
        with torch.no_grad():
            for name, parameter in new.named_parameters(recurse=False):
                old = getattr(norm, name, None)
                if isinstance(old, Tensor) and old.shape == parameter.shape:
                    parameter.copy_(old)
        self._replace(site.name, ChannelsLast(new) if site.layout == "channels_last" else new)

    def _absorbed(self, site: NormSite) -> bool:
        """Whether convolutions that normalize by themselves take this norm's place."""

        def normalizes(name: str) -> bool:
            return isinstance(self.replacements.get(self.modules[name]), KNConv2d)

        if site.before is not None and normalizes(site.before):
            return True
        return bool(site.after) and all(normalizes(name) for name in site.after)

    def _nothing(self, site: NormSite) -> nn.Module:
        """Return what hands a norm's input on, safe from what may write into it afterwards."""
        if site.before is not None:
            return nn.Identity()  # the convolution's output is read here alone
        for name in site.writers:
            self.modules[name].inplace = False
        return Copy() if site.overwritten else nn.Identity()

    def _replace(self, name: str, new: nn.Module) -> None:
        old = self.modules[name]
        self.replacements[old] = new.train(old.training)
        self.changed.append(Change(name, type(old).__name__, type(new).__name__))

    def _keep(self, name: str, reason: str) -> None:
        self.kept.append(Kept(name, type(self.modules[name]).__name__, reason))


def _problem(conv: nn.Conv2d, core: Conv, beside_norm: bool) -> str | None:
    if not beside_norm:
        return "no norm stands beside it"
    if conv.padding_mode not in (PADDING_MODES if isinstance(core, KNConv2d) else ("zeros",)):
        return f"padding_mode='{conv.padding_mode}'"
    if type(conv) not in (nn.Conv2d, WSConv2d):
        return "its class has a forward of its own"
    if computes_its_weight(conv):
        return f"its {COMPUTED_WEIGHT}"
    return None


def _same_kind(norm: nn.Module, new: nn.Module) -> bool:
    if isinstance(norm, _BatchNorm) and isinstance(new, _BatchNorm):
        return True
    groups = {getattr(layer, "num_groups", None) for layer in (norm, new)}
    return type(norm) is type(new) and len(groups) == 1


def _zeros(conv: nn.Conv2d) -> nn.Parameter:
    return nn.Parameter(conv.weight.new_zeros(conv.out_channels))


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return height, width
