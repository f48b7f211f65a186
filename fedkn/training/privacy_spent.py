"""What differential privacy a client has spent: a history of its steps, kept between rounds.

The history is what Opacus' accountants keep: runs of steps of one noise multiplier and one sample
rate. It travels as three tensors, because what a client carries is tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkn.training import sampled_gaussian

__all__ = ["PRIVACY", "PrivacySpent"]

PRIVACY = "privacy/"
"""What the names of its tensors begin with."""

_NOISE, _RATE, _STEPS = (PRIVACY + name for name in ("noise_multiplier", "sample_rate", "steps"))


@dataclass(frozen=True)
class PrivacySpent:
    """A client's steps of DP-SGD so far: runs of (noise multiplier, sample rate, steps).

    Two neighbouring data sets differ in one example, which one of them lacks.
    """

    history: tuple[tuple[float, float, int], ...] = ()

    @classmethod
    def restored(cls, carried: Mapping[str, Tensor]) -> PrivacySpent:
        """Return the spending whose `tensors` were carried; nothing spent where there are none.

        Raises ValueError where they are incomplete or do not fit together: to begin anew would
        report too little.
        """
        names = (_NOISE, _RATE, _STEPS)
        present = [name for name in names if name in carried]
        if not present:
            return cls()
        if len(present) < len(names):
            raise ValueError(f"of the privacy spent only {', '.join(present)} was kept")
        noise, rate, steps = (carried[name].flatten().tolist() for name in names)
        history = tuple(
            (float(n), float(q), int(s)) for n, q, s in zip(noise, rate, steps, strict=True)
        )
        return cls(history)

    def tensors(self) -> dict[str, Tensor]:
        """Return the history by name: float64, float64 and int64, one element for each run."""
        noise = [noise for noise, _, _ in self.history]
        rate = [rate for _, rate, _ in self.history]
        steps = [steps for _, _, steps in self.history]
        return {
            _NOISE: torch.tensor(noise, dtype=torch.float64),
            _RATE: torch.tensor(rate, dtype=torch.float64),
            _STEPS: torch.tensor(steps, dtype=torch.int64),
        }

    def after(self, noise_multiplier: float, sample_rate: float, steps: int) -> PrivacySpent:
        """Return what is spent after so many more steps.

        Equal steps become one run, whenever they were taken: their order costs nothing, and a
        history grows by kinds of steps, not by rounds.
        """
        if not steps:
            return self
        runs = {(noise, rate): count for noise, rate, count in self.history}
        kind = (noise_multiplier, sample_rate)
        runs[kind] = runs.get(kind, 0) + steps
        return PrivacySpent(tuple((*key, count) for key, count in runs.items()))

    def plus(self, other: PrivacySpent) -> PrivacySpent:
        """Return what both have spent together."""
        total = self
        for noise, rate, steps in other.history:
            total = total.after(noise, rate, steps)
        return total

    def epsilon(self, delta: float) -> float:
        """Return the epsilon of (epsilon, `delta`)-differential privacy of all steps together.

        An upper bound (`fedkn.training.sampled_gaussian`): infinite where a step had no noise, 0
        before the first.
        """
        return sampled_gaussian.epsilon(self.history, delta)
