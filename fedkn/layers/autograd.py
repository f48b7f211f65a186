"""Which implementation of the kernel-normalized convolution runs, and how autograd sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fedkn.layers import cuda, mapped, native, plain
from fedkn.layers.composite import Settings, averages_over_drops, composite

__all__ = ["normalized_convolution", "plain_tensors"]


def normalized_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, eager: bool
) -> Tensor:
    """Apply `composite`, by the fastest way that the circumstances allow.

    Where `plain_tensors` said that they are (`eager`), they take the hand-written gradients: of
    `cuda` or `native` where these serve, else of `plain`. Transforms, compilers and exporters are
    given `composite`, which they can see through, but for the vmap that `mapped` serves; so are
    small units in evaluation.
    """
    if averages_over_drops(x, settings):
        return composite(x, weight, bias, settings)
    if not eager:
        run = mapped.convolution if mapped.serves(x, weight, bias) else composite
        return run(x, weight, bias, settings)
    device = x.device.type
    known = torch.amp.is_autocast_available(device)  # not to "meta"
    if known and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        with torch.autocast(device, enabled=False):
            return _run(x, weight, bias, settings)
    return _run(x, weight, bias, settings)


def plain_tensors() -> bool:
    """Whether tensors are what they seem: no transform, compiler, exporter or tracer looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    if native.serves(x, weight, bias):
        return native.convolution(x, weight, bias, settings)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y: Tensor = _NormalizedConvolution.apply(x, weight, bias, settings)  # type: ignore[no-untyped-call] # torch's
        return y
    return _implementation(x, weight, bias).forward(x, weight, bias, settings, keep=False)[0]


class _Implementation(Protocol):
    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings, keep: bool
    ) -> tuple[Tensor, plain.Saved | None]: ...

    def backward(
        self,
        g: Tensor,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        saved: plain.Saved,
        settings: Settings,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...


def _implementation(x: Tensor, weight: Tensor, bias: Tensor | None) -> _Implementation:
    return cuda if cuda.serves(x, weight, bias) else plain


class _NormalizedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings
    ) -> Tensor:
        implementation = _implementation(x, weight, bias)
        y, saved = implementation.forward(x, weight, bias, settings, keep=True)
        assert saved is not None
        ctx.implementation, ctx.settings, ctx.far = implementation, settings, saved.far
        ctx.save_for_backward(
            x, weight, bias, saved.output, saved.mean, saved.scale, saved.sums, saved.bits
        )
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, output, mean, scale, sums, bits = ctx.saved_tensors
        saved = plain.Saved(output, mean, scale, ctx.far, sums, bits)
        tensors, wanted = (x, weight, bias), ctx.needs_input_grad[:3]
        run = functools.partial(
            ctx.implementation.backward, saved=saved, settings=ctx.settings, wanted=wanted
        )
        if torch.is_grad_enabled():
            return (*_Gradients.apply(g, *tensors, run, ctx.settings, wanted), None)  # type: ignore[no-untyped-call] # torch's
        return (*run(g, tensors), None)


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
            y = composite(x, weight, bias, ctx.settings)
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
