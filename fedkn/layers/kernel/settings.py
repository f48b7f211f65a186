"""What a kernel-normalized layer does to its tensors, in numbers."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["ACTIVATIONS", "EVAL_MODES", "SMALL_UNIT", "Geometry", "Settings", "Statistics"]

EVAL_MODES = ("expected", "plain", "stochastic")
ACTIVATIONS = ("relu",)
SMALL_UNIT = 64
"""The largest unit that is averaged over how many of its elements drop (`small_units`): beyond,
with and without that differ by less than a percent."""
Statistics = Literal["stochastic", "expected", "plain"]
"""How mean and variance are taken: under a dropout mask (training), as that gives them in
expectation, or without dropout."""


class Geometry(NamedTuple):
    """Where the windows of a convolution lie: (height, width) pairs, zero padding."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def unit_size(self, channels: int) -> int:
        """Return n, the number of elements of a unit of maps with so many `channels`."""
        return channels * self.kernel[0] * self.kernel[1]


class Settings(NamedTuple):
    """What a kernel-normalized convolution does to its tensors."""

    geometry: Geometry
    n: int
    """The elements of a unit."""
    key: int | Tensor | None
    """The key of the dropout mask; None for deterministic statistics."""
    level: int
    """The drop probability in units of 1/65536."""
    eps: float
    relu: bool
    keeps_output: bool = False
    """Whether the output itself is kept for the backward pass even without ReLU."""

    def of_clients(self, clients: int) -> list[Settings]:
        """Return each client's own, whose keys are ``self.key`` (K,), or one for all."""
        key = self.key
        if not isinstance(key, Tensor) or not key.dim():
            return [self] * clients
        return [self._replace(key=own) for own in key]

    @property
    def one_map(self) -> bool:
        """Whether the only map of filters that is kept is the output."""
        return self.relu or self.keeps_output

    @property
    def centres_filters(self) -> bool:
        """Whether centred filters take the mean away.

        Without a mask the mean is that of the convolution's own input, so conv(x, w - mean(w)) is
        conv(x, w) - mean * sum(w), and loses fewer digits than a subtraction afterwards. With
        groups the mean is over all channels while a filter sees some, so it does not hold.
        """
        return self.key is None and self.geometry.groups == 1

    @property
    def averages_over_drops(self) -> bool:
        """Whether a deterministic pass averages over how many elements drop (`small_units`)."""
        return self.n <= SMALL_UNIT and self.key is None and self.level > 0
