"""The random generators of the process, which are the user's: kept as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["generators_kept"]


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the generators of Python, NumPy and PyTorch (the CPU's) back after the block.

    It is for imports: what is imported may draw (rich does) or seed. NumPy and PyTorch are not
    imported for it.
    """
    numpy, torch = (sys.modules.get(name) for name in ("numpy.random", "torch"))
    python = random.getstate()
    numpys = None if numpy is None else numpy.get_state()
    torchs = None if torch is None else torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(numpys)
        if torch is not None:
            torch.set_rng_state(torchs)
