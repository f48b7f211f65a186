"""The embedded source: 8x8 handwritten digits, no download needed."""

from __future__ import annotations

import numpy as np
import torch

from fedkn.data.digits_table import digits_table
from fedkn.data.examples import Examples, Source
from fedkn.data.split import stratified_split

__all__ = ["load_digits"]


def load_digits() -> Source:
    """Return the 1,797 digits of 1x8x8 pixels, 1,438 for training and 359 for testing.

    The source has no test set of its own: a stratified fifth is held out by a draw that is always
    the same, whatever the experiment's seed. Its values 0..16 are scaled to 0..255.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
    Repository (1998), https://doi.org/10.24432/C50P49, the test part as packed by scikit-learn.
    """
    table = digits_table()
    pixels = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    data = Examples(
        torch.from_numpy(pixels),
        torch.from_numpy(table[:, -1].astype(np.int64)),
        tuple(str(name) for name in range(10)),
    )
    kept, held = stratified_split(data.targets, 0.2, seed=0, purpose="test images of digits")
    return Source("digits", data.select(kept), data.select(held), held_out=True)
