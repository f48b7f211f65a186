"""`convert`: another normalizer in any torch model, its convolutions' weights kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkn.errors import UserError
from fedkn.layers import KernelNorm2d, KNConv1d, KNConv2d, LocalContextNorm2d, WSConv2d
from fedkn.layers.kernel.padding import PADDING_MODES
from fedkn.models.changes import Change, Conversion, Kept
from fedkn.models.copying import copied, lazy_layer
from fedkn.models.counterparts import counterpart, on_one_device
from fedkn.models.hooks import copy_tensor_hooks, move_hooks, tied_down
from fedkn.models.layouts import UNUSABLE, Norm
from fedkn.models.splitting import split
from fedkn.models.wiring import (
    COMPUTED_WEIGHT,
    Conv,
    NormSite,
    Wiring,
    computes_its_weight,
    read_wiring,
)
from fedkn.normalizers import Normalizer
from fedkn.text import printable

__all__ = ["convert", "swap"]


class ChannelsLast(nn.Module):
    """A norm for (N, C, H, W), applied to (N, H, W, C)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, H, W, C)."""
        out: Tensor = self.norm(x.permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1)


class AsMaps(nn.Module):
    """A norm for maps (N, C, H, W), applied to (N, C), (N, C, L) or (N, C, D, H, W).

    Axes that there are not are of length one, those that there are too many are laid in one.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x`."""
        maps = x.flatten(3) if x.dim() > 4 else x[(..., *[None] * (4 - x.dim()))]
        out: Tensor = self.norm(maps)
        return out.view_as(x) if out.is_contiguous() else out.reshape(x.shape)


class Copy(nn.Module):
    """The identity, as a copy: for a place where the model then writes into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a copy of `x`."""
        return x.clone()


def convert(module: nn.Module, normalizer: Normalizer) -> tuple[nn.Module, Conversion]:
    """Return a copy of `module` in which `normalizer` does the normalizing, and what was changed.

    Each BatchNorm, GroupNorm, InstanceNorm or LayerNorm over image maps becomes the normalizer's
    own, as do BatchNorms, GroupNorms and InstanceNorms over series, volumes and features where it
    can take these; scales and biases are taken over where the new norm has them. Convolutions
    beside a norm become the normalizer's, with the weights they had. For KernelNorm these are
    KNConvs, of images and of series, and a norm with a convolution right before it or (through an
    activation) right after it disappears into it; one that stands alone becomes a KernelNorm 1x1.
    Convolutions of volumes stay. A convolution gains a bias of zero where it lost the norm that had
    one. A pretrained network needs training again after conversion.

    A new layer has the device, the dtype, the mode (training or evaluation) and the hooks of the
    old one, and is frozen (``requires_grad``) where that was. A layer that somebody tied something
    to that another layer could not bear (a parametrization, a forward of its own), or of which the
    model's own code reads tensors that the new layer lacks, is kept, and the report says so.

    Raises UserError where the normalizer does not fit, such as groups that do not divide, where a
    convolution or norm is lazy, and where the model cannot be copied.
    """
    lazy = lazy_layer(module, Conv | Norm)
    if lazy is not None:
        raise UserError(f"'{lazy}' of the model has no shape yet: send a batch through it first")
    model = copied(module)
    wiring = read_wiring(model)
    model, apart = _apart(model, wiring)
    if apart:
        wiring = read_wiring(model)
    # New layers draw initial weights, which are replaced: nothing drawn later may depend on them.
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices):
        return _Converter(model, normalizer, apart).run(wiring)


def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each replacement in every place of its original, in `model` itself; return the model."""
    for parent in list(model.modules()):
        # Not named_children, which lists a module that stands in two places once.
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)


def _apart(model: nn.Module, wiring: Wiring) -> tuple[nn.Module, list[Change]]:
    """Take norms apart whose class calls parts of its own behind the norm; return what was done."""
    modules = dict(model.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    changes: list[Change] = []
    for site in wiring.sites:
        norm = modules[site.name]
        if site.layout != "own" or site.name in wiring.read or not (whole := split(norm)):
            continue
        replacements[norm] = whole
        names = [name for name, _ in whole.named_children()]
        after = f"{type(whole[0]).__name__}, then {' and '.join(names[1:])}"
        changes.append(Change(site.name, type(norm).__name__, after))
    return swap(model, replacements), changes


class _Converter:
    def __init__(self, model: nn.Module, normalizer: Normalizer, apart: list[Change]) -> None:
        self.model = model
        self.normalizer = normalizer
        self.modules = dict(model.named_modules())
        self.read: frozenset[str] = frozenset()
        self.replacements: dict[nn.Module, nn.Module] = {}
        self.apart = frozenset(apart)
        self.changed: list[Change] = [*apart]
        self.kept: list[Kept] = []

    def run(self, wiring: Wiring) -> tuple[nn.Module, Conversion]:
        self.read = wiring.read
        reasons = {site.name: self._unusable(site) for site in wiring.sites}
        usable = [site for site in wiring.sites if not reasons[site.name]]
        beside = {conv for site in usable for conv in (site.before, *site.after) if conv}
        for name in wiring.convolutions:
            self._convolution(name, name in beside)
        for site in wiring.sites:
            if reasons[site.name]:
                self._keep(site.name, reasons[site.name])
            else:
                self._norm(site)
        for name in wiring.volumes:
            self._volume(name)
        for name in wiring.strangers:
            self._keep(name, "its class is not known: if it normalizes, replace it by hand")
        self.kept += [
            Kept(name, type(m).__name__, "it is kernel-normalized already")
            for name, m in self.modules.items()
            if isinstance(m, KernelNorm2d)
        ]
        model = swap(self.model, self.replacements)
        return model, Conversion(tuple(self.changed), tuple(self.kept), wiring.traced)

    def _unusable(self, site: NormSite) -> str:
        """Return why a norm must stay, empty if it need not."""
        if site.layout in UNUSABLE:
            return UNUSABLE[site.layout]
        if site.name in self.read:
            return "the model's own code reads its tensors itself"
        return tied_down(self.modules[site.name])

    def _volume(self, name: str) -> None:
        """Say of a convolution of volumes that it stays, where the normalizer has its own."""
        conv = self.modules[name]
        assert isinstance(conv, nn.Conv3d)
        made = self.normalizer.conv(4, 4, 3, then_norm=True)
        if type(made) is not nn.Conv2d:
            self._keep(name, f"{type(made).__name__} has no form for volumes")

    def _convolution(self, name: str, beside_norm: bool) -> None:
        conv = self.modules[name]
        if isinstance(conv, KNConv1d | KNConv2d):
            self._keep(name, "it is kernel-normalized already: build the model anew")
            return
        assert isinstance(conv, nn.Conv1d | nn.Conv2d)
        try:
            new = self._made(conv.weight, lambda: counterpart(self.normalizer, conv))
        except UserError:
            if beside_norm:
                raise
            self._keep(name, "no norm stands beside it")
            return
        if isinstance(conv, nn.Conv1d) and not isinstance(new, nn.Conv1d | KNConv1d):
            self._keep(name, f"{type(new).__name__} has no form for series")
            return
        core = new if isinstance(new, Conv) else new.get_submodule("conv")
        assert isinstance(core, Conv)
        if type(core) is type(conv):
            if beside_norm and core.bias is not None and conv.bias is None:
                conv.bias = _zeros(conv)
                self.changed.append(Change(name, "without bias", "with a bias of zero"))
            return
        problem = _problem(conv, core, beside_norm)
        if not problem and new is not core and name in self.read:
            problem = "the model's own code reads its tensors, and its padding needs another layer"
        if problem:
            self._keep(name, problem)
            return
        # The parameters themselves, so that tied weights stay tied.
        core.requires_grad_(conv.weight.requires_grad)
        if conv.bias is not None:
            core.bias = conv.bias
        elif core.bias is not None:
            core.bias = _zeros(conv)
        core.weight = conv.weight
        if isinstance(core, KNConv1d | KNConv2d):
            core.padding_mode = conv.padding_mode
        self._replace(name, new)

    def _norm(self, site: NormSite) -> None:
        norm = self.modules[site.name]
        neighbours = [self.modules[name] for name in (site.before, *site.after) if name]
        tensors = [
            *(conv.weight for conv in neighbours),  # the dtype of what flows, where it has its own
            *norm.parameters(),
            *norm.buffers(),
            *self.model.parameters(),
        ]
        like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
        new = self._made(like, lambda: self.normalizer.norm(site.channels))
        if site.layout in _AXES and (problem := _fails(new, site)) and not self._absorbed(site):
            self._keep(site.name, problem)
            return
        if self._absorbed(site) or isinstance(new, nn.Identity):
            self._replace(site.name, self._nothing(site))
            return
        if isinstance(norm, nn.SyncBatchNorm) and isinstance(new, _BatchNorm):
            new = self._made(like, lambda: on_one_device(norm))
        elif _same_kind(norm, new):
            self._own_already(site.name)
            return
        learned = [*norm.parameters()] or [conv.weight for conv in neighbours]
        new.requires_grad_(not learned or any(p.requires_grad for p in learned))
        # Statistics of one kind of norm are not those of another.
        same = isinstance(norm, _BatchNorm) and isinstance(new, _BatchNorm)
        missing = []
        with torch.no_grad():
            for name, tensor in (*new._parameters.items(), *(new._buffers.items() if same else ())):
                old = getattr(norm, name, None)
                if not isinstance(old, Tensor) or tensor is None:
                    continue
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(old.requires_grad)
                if old.shape == tensor.shape:
                    tensor.copy_(old)
                else:
                    missing.append(name)
        note = f"{' and '.join(missing)} of another shape left behind" if missing else ""
        placed = {"channels_last": ChannelsLast, **dict.fromkeys(_AXES, AsMaps)}.get(site.layout)
        self._replace(site.name, new if placed is None else placed(new), note)

    def _made(self, like: Tensor, make: Callable[[], nn.Module]) -> nn.Module:
        """Return what `make` makes, on the device and in the dtype of `like`."""
        with like.device:
            return make().to(dtype=like.dtype)

    def _absorbed(self, site: NormSite) -> bool:
        """Whether convolutions that normalize by themselves take this norm's place."""

        def normalizes(name: str) -> bool:
            return isinstance(self.replacements.get(self.modules[name]), KNConv1d | KNConv2d)

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

    def _replace(self, name: str, new: nn.Module, note: str = "") -> None:
        old = self.modules[name]
        self.replacements[old] = new.train(old.training)
        notes = [note] if note else []
        if count := move_hooks(old, new):
            notes.append(f"{count} hook{'s' * (count > 1)} moved to it")
        # Those of a convolution's went over with the parameters themselves.
        if isinstance(old, Norm) and (lost := copy_tensor_hooks(old, new)):
            notes.append(f"hooks of its {' and '.join(lost)} are gone")
        self.changed.append(Change(name, type(old).__name__, type(new).__name__, "; ".join(notes)))

    def _own_already(self, name: str) -> None:
        """Say that a norm stays: in the note of what it was taken apart from, if it was."""
        said = f"it is the '{self.normalizer.name}' normalizer's already"
        whole = name.rpartition(".")[0]
        for place, change in enumerate(self.changed):
            if change.name == whole and change in self.apart:
                self.changed[place] = replace(change, note=f"its norm stays: {said}")
                return
        self._keep(name, said)

    def _keep(self, name: str, reason: str) -> None:
        self.kept.append(Kept(name, type(self.modules[name]).__name__, reason))


def _problem(conv: nn.Conv1d | nn.Conv2d, core: Conv, beside_norm: bool) -> str:
    """Return why a convolution must stay, empty if it need not."""
    modes = PADDING_MODES if isinstance(core, KNConv1d | KNConv2d) else ("zeros",)
    reasons = {
        "no norm stands beside it": not beside_norm,
        f"padding_mode='{conv.padding_mode}'": conv.padding_mode not in modes,
        f"its {COMPUTED_WEIGHT}": computes_its_weight(conv),
        tied_down(conv): bool(tied_down(conv)),
        "its class has a forward of its own": type(conv) not in _OF_TORCH,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


_OF_TORCH = (nn.Conv1d, nn.Conv2d, WSConv2d)
_AXES: dict[str, tuple[int, ...]] = {"features": (), "series": (4,), "volumes": (2, 2, 3)}
"""What is not image maps, and the axes beside examples and channels of an example to try it on."""


def _fails(norm: nn.Module, site: NormSite) -> str:
    """Return why the normalizer's norm cannot take this norm's place, empty if it can: try it."""
    if any(t.is_meta for t in (*norm.parameters(), *norm.buffers())):
        return ""
    if site.layout == "volumes" and isinstance(norm, LocalContextNorm2d):
        return "its neighbourhoods are of image maps, and this one takes volumes"
    twin = AsMaps(copied(norm)).train()
    like = next(twin.parameters(), torch.empty(0))
    shape = (2, site.channels, *_AXES[site.layout])
    x = torch.arange(math.prod(shape), dtype=like.dtype, device=like.device).sin().view(shape)
    try:
        with torch.no_grad():
            out = twin(x)
    except Exception as error:
        return f"in its place the normalizer's fails ({printable(error, 160)})"
    # A scale of one and a bias of zero: what gives nothing back has erased what it was given.
    if torch.equal(out, torch.zeros_like(out)):
        return "in its place the normalizer's would give zeros: it takes statistics over pixels"
    return ""


def _same_kind(norm: nn.Module, new: nn.Module) -> bool:
    if isinstance(norm, _BatchNorm) and isinstance(new, _BatchNorm):
        return True
    # Groups, and whether there are running statistics.
    kinds = {
        (getattr(m, "num_groups", None), *(n for n, _ in m.named_buffers())) for m in (norm, new)
    }
    return type(norm) is type(new) and len(kinds) == 1


def _zeros(conv: nn.Conv1d | nn.Conv2d) -> nn.Parameter:
    return nn.Parameter(conv.weight.new_zeros(conv.out_channels), conv.weight.requires_grad)
