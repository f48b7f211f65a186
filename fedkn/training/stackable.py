"""Whether clients can train a network together, stacked: found out by trying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.layers.kernel.dropout import dropout_stream, keys_of
from fedkn.layers.stacked_convolution import StackedConvolutions
from fedkn.text import printable
from fedkn.training.draws import own_draws
from fedkn.training.stacked import forward_of
from fedkn.training.stacked_workspace import stackable_parameters

__all__ = ["try_stacking"]


def try_stacking(model: nn.Module, x: Tensor) -> str:
    """Run `model` on `x` (B, …), B of 2 or more, for two clients at once, and look what happens.

    Return why clients cannot train it together, naming the layer; empty if they can.

    In training mode. It must have no tensors that change without being trained, draw no random
    numbers of its own, be made of what ``torch.func.vmap`` knows, and treat every example by
    itself, because shorter batches are filled up. The model is left as it is, but for its mode.

    Raises:
        UserError: the model fails on `x` as it is.
    """
    model.train()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    found = _tried(model, x.contiguous())
    for buffer, value in buffers:
        buffer.copy_(value)
    return found


def _tried(model: nn.Module, x: Tensor) -> str:
    watch = _Watch()
    with own_draws(x.device, 0) as draws, torch.no_grad(), watch.on(model):
        try:
            with dropout_stream(0) as stream:
                model(x)
        except Exception as error:  # the network's own code
            raise UserError(
                f"the model fails on {tuple(x.shape)} inputs at {watch.where}: "
                f"{printable(f'{type(error).__name__}: {error}', 200)}"
            ) from error
        try:
            parameters, fixed = stackable_parameters(model)
            before = draws.state()
            keys = keys_of(torch.tensor([0, 1], device=x.device), stream.calls)
            stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
            stacked |= {name: p.expand(2, *p.shape) for name, p in fixed.items()}
            forward = torch.func.vmap(forward_of(model))
            with StackedConvolutions():
                one = forward(stacked, torch.stack([x, x]), keys)
            if draws.state() != before:
                return f"{_random_layer(model)} draws random numbers of its own"
            others = torch.cat([x[:1], 0.5 - x[1:]])
            with StackedConvolutions():
                other = forward(stacked, torch.stack([others, others]), keys)
        except UserError as error:
            return str(error).partition(": set engine")[0]
        except Exception as error:  # the network's own code, under a transform it does not know
            said = printable(error, 160)
            if "randomness" in said:
                return f"{watch.where} draws random numbers of its own"
            return f"{watch.where} cannot be run for several clients ({said})"
    if not torch.allclose(one[:, 0], other[:, 0], rtol=1e-4, atol=1e-5, equal_nan=True):
        return "the network mixes the examples of a batch"
    return ""


class _Watch:
    """Which layer is being run."""

    def __init__(self) -> None:
        self._inside: list[str] = []

    @property
    def where(self) -> str:
        """The innermost layer that has begun and not ended."""
        return self._inside[-1] if self._inside else "the network"

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            shown = f"{type(module).__name__} '{name}'" if name else type(model).__name__

            def enter(layer: nn.Module, inputs: Any, shown: str = shown) -> None:
                del layer, inputs
                self._inside.append(shown)

            def leave(layer: nn.Module, inputs: Any, output: Any) -> None:
                del layer, inputs, output
                if self._inside:
                    self._inside.pop()

            handles += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _random_layer(model: nn.Module) -> str:
    words = ("dropout", "droppath", "stochasticdepth", "rrelu")
    for name, module in model.named_modules():
        if any(word in type(module).__name__.lower() for word in words):
            return f"{type(module).__name__} '{name}'"
    return "the network"
