"""Backends with gradients by hand, as autograd sees them: one operation, differentiable twice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fedkn.layers.kernel import definition
from fedkn.layers.kernel.settings import Settings

__all__ = ["ByHand", "Saved", "by_hand"]


class Saved(NamedTuple):
    """What a backward pass needs besides the convolution's own tensors."""

    output: Tensor
    """y if `Settings.one_map`, else z of `fedkn.layers.kernel.backends.plain`."""
    mean: Tensor
    scale: Tensor
    far: bool
    """Whether some mean is so many deviations from zero that float32 needs shifted formulas."""
    sums: Tensor | None = None
    """The filters' sums, where `backward` would take them again."""
    bits: Tensor | None = None
    """The mask, where `backward` would draw it again (`dropout.mask_of_bits`)."""
    filters: Tensor | None = None
    """The filters as they convolved, where `backward` would make them again."""


class ByHand(Protocol):
    """A backend's forward and backward pass, in the names of `definition.convolution`."""

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, keep: bool
    ) -> tuple[Tensor, Saved | None]:
        """Return the output and, if `keep`, what `backward` needs."""

    def backward(
        self,
        g: Tensor,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        saved: Saved,
        settings: Settings,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of (x, weight, bias), None where not `wanted`, for output's `g`."""


def by_hand(
    backend: ByHand,
) -> Callable[[Tensor, Tensor, Tensor | None, Settings], Tensor]:
    """Return `definition.convolution` as `backend` computes it and its gradients."""

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
        if torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            y: Tensor = _NormalizedConvolution.apply(x, weight, bias, settings, backend)  # type: ignore[no-untyped-call] # torch's
            return y
        return backend.forward(x, weight, bias, settings, keep=False)[0]

    return run


class _NormalizedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - the arguments of autograd functions have no names
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: Settings,
        backend: ByHand,
    ) -> Tensor:
        y, saved = backend.forward(x, weight, bias, settings, keep=True)
        assert saved is not None
        ctx.backend, ctx.settings, ctx.far = backend, settings, saved.far
        ctx.save_for_backward(x, weight, bias, *saved[:3], saved.sums, saved.bits, saved.filters)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, output, mean, scale, *others = ctx.saved_tensors
        saved = Saved(output, mean, scale, ctx.far, *others)
        tensors, wanted = (x, weight, bias), ctx.needs_input_grad[:3]
        run = functools.partial(
            ctx.backend.backward, saved=saved, settings=ctx.settings, wanted=wanted
        )
        if torch.is_grad_enabled():
            return (*_Gradients.apply(g, *tensors, run, ctx.settings, wanted), None, None)  # type: ignore[no-untyped-call] # torch's
        return (*run(g, tensors), None, None)


class _Gradients(torch.autograd.Function):
    """The backward pass as a function of its own, so that it has derivatives in turn."""

    @staticmethod
    def forward(  # noqa: PLR0917 - the arguments of autograd functions have no names
        ctx: Any,
        g: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        run: Callable[..., tuple[Tensor | None, ...]],
        settings: Settings,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        ctx.settings, ctx.wanted = settings, wanted
        ctx.save_for_backward(g, x, weight, bias)
        return run(g, (x, weight, bias))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        # Rare, so it is left to autograd, through the definition.
        with torch.enable_grad():
            # Aliases: g may depend on x, but the way from g to x is not this function's.
            tensors: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            g, x, weight, bias = tensors
            y = _defined(x, weight, bias, ctx.settings)
            sources = [t for t, wanted in zip(tensors[1:], ctx.wanted, strict=True) if wanted]
            outer = [u for u, wanted in zip(upstream, ctx.wanted, strict=True) if wanted]
            first = torch.autograd.grad(y, sources, g, create_graph=True)
        pairs = [(f, u) for f, u in zip(first, outer, strict=True) if u is not None]
        asked = [i for i in range(4) if ctx.needs_input_grad[i]]
        second = torch.autograd.grad(
            [f for f, _ in pairs],
            [tensors[i] for i in asked],
            [u for _, u in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        found: list[Tensor | None] = [None] * 7
        for i, gradient in zip(asked, second, strict=True):
            found[i] = gradient
        return tuple(found)


def _defined(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """Return the definition's output; of clients, which are a first dimension, each one's own."""
    if x.dim() == 4:
        return definition.convolution(x, weight, bias, settings)
    biases = [None] * len(x) if bias is None else bias
    parts = zip(x, weight, biases, settings.of_clients(len(x)), strict=True)
    return torch.stack([definition.convolution(*part) for part in parts])
