"""Random draws of networks that fedkn does not know: dropout, drop-path, noise in a forward pass.

fedkn's own layers draw from a `dropout_stream`. `torch.nn.Dropout`, `torch.rand` in somebody's
forward, `random.random()` and `np.random.rand()` draw from generators that belong to the whole
process, so what they draw would depend on the worker, on the clients before, and on whether a run
was resumed. Here these generators are seeded, and put back afterwards: nothing outside notices.
"""

# ruff: noqa: NPY002 - the old global generator is the one to be seeded

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from fedkn.layers import dropout_stream
from fedkn.layers.kernel.dropout import Stream

__all__ = ["Draws", "own_draws"]


class Draws:
    """The process's generators: PyTorch's on the CPU and on `device`, Python's and NumPy's."""

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator, *_generators_of(device)]

    def seeded(self, seed: int) -> AbstractContextManager[Stream]:
        """Return the context of a forward pass in which all draws of PyTorch follow from `seed`.

        The pass backward may come after it. Python's and NumPy's draws follow from the seed of
        `own_draws`, one after another: to seed those for each pass would take longer.
        """
        self.reseed(seed)
        return dropout_stream(seed)

    def reseed(self, seed: int) -> None:
        """Seed PyTorch's generators, without a `dropout_stream`."""
        for generator in self._generators:
            generator.manual_seed(seed)

    def state(self) -> tuple[Any, ...]:
        """Return what is equal to an earlier `state` if nothing was drawn in between."""
        return (*self.device_state(), *self.host_state())

    def host_state(self) -> tuple[Any, ...]:
        """Return the part of `state` that is the host's."""
        return bytes(torch.default_generator.get_state().numpy()), *self.python_state()

    def python_state(self) -> tuple[Any, ...]:
        """Return the part of `state` that is Python's and NumPy's."""
        name, key, *rest = np.random.get_state()
        return (random.getstate(), name, bytes(np.asarray(key)), *rest)

    def device_state(self) -> tuple[Any, ...]:
        """Return the part of `state` that is the device's, none where it is the CPU."""
        return tuple(bytes(g.get_state().numpy()) for g in self._generators[1:])


@contextmanager
def own_draws(device: torch.device, seed: int) -> Iterator[Draws]:
    """Seed the process's generators with `seed` inside the block, and put them back after it.

    They are the process's, so another thread that draws meanwhile draws from `seed` too.
    """
    draws = Draws(device)
    generators = [(generator, generator.get_state()) for generator in draws._generators]
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    draws.reseed(seed)
    try:
        yield draws
    finally:
        for generator, state in generators:
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)


def _generators_of(device: torch.device) -> list[torch.Generator]:
    """Return the generator that layers on `device` draw from; none where it is the CPU's."""
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        module.init()
        index = module.current_device() if device.index is None else device.index
        return [module.default_generators[index]]
    if device.type == "mps":
        return [torch.mps._get_default_mps_generator()]
    return []
