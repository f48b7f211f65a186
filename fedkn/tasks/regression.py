"""One or more numbers for each example."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from fedkn.errors import UserError
from fedkn.tasks.counts import ratio
from fedkn.tasks.metric import Metric
from fedkn.tasks.task import Task
from fedkn.text import printable

__all__ = ["Regression"]


class Regression(Task):
    """Targets are numbers, float32 (N,) or (N, K); outputs as many for each example, (N, K).

    The loss of an example is the mean over its numbers. The RMSE decides, the lowest being best:
    the root of the mean square of all errors. R2 is the mean over the K numbers of what is
    explained of each one's variance; of one that does not vary it is 1 if every answer is right,
    else 0; of fewer than two examples there is none.

    Args:
        loss: ``mse``, ``mae`` or ``huber``.
        delta: of ``huber``: errors up to it count by their square, larger ones by their size.
    """

    metrics = (
        Metric("rmse", higher_is_better=False, lowest=0.0),
        Metric("mae", higher_is_better=False, lowest=0.0),
        Metric("r2", higher_is_better=True, highest=1.0),
    )
    least_loss = 0.0

    def __init__(self, loss: str = "mse", delta: float = 1.0) -> None:
        if loss not in _LOSSES:
            raise UserError(
                f"task.options.loss = '{printable(loss, 60)}': give {', '.join(_LOSSES)}"
            )
        number = isinstance(delta, int | float) and not isinstance(delta, bool)
        if not number or not 0 < delta < math.inf:
            raise UserError(f"task.options.delta = {printable(delta, 60)}: give a number above 0")
        self._loss, self._delta = loss, float(delta)

    def outputs(self, classes: int, shape: tuple[int, ...]) -> int:
        """Return one for each number of a target."""
        return math.prod(shape)

    def check(self, targets: Tensor, classes: Sequence[str]) -> None:
        """Raise UserError unless `targets` are finite numbers, float32 (N,) or (N, K)."""
        if targets.dtype != torch.float32 or targets.dim() not in (1, 2):
            raise UserError(
                "task 'regression' needs targets of float32 (N,) or (N, K), but the data's are "
                f"{str(targets.dtype).removeprefix('torch.')} {tuple(targets.shape)}: let the "
                "source return numbers, or set task.name to what the data are for"
            )
        if not bool(torch.isfinite(targets).all()):
            raise UserError(
                "task 'regression': a target is NaN or infinite: leave such examples out of the "
                "source"
            )

    def check_outputs(self, outputs: Tensor, targets: Tensor, count: int) -> None:
        """Raise UserError unless there is an output for each number: (N, `count`)."""
        if outputs.shape not in ((len(targets), count), targets.shape):
            raise UserError(
                f"the network returns {tuple(outputs.shape)} for {len(targets)} examples, where "
                f"regression needs {(len(targets), count)}: give its last layer {count} outputs "
                "(num_classes)"
            )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, (N,), the mean over its numbers."""
        wanted = targets.to(outputs.dtype).view_as(outputs)
        if self._loss == "mse":
            every = F.mse_loss(outputs, wanted, reduction="none")
        elif self._loss == "mae":
            every = F.l1_loss(outputs, wanted, reduction="none")
        else:
            every = F.huber_loss(outputs, wanted, reduction="none", delta=self._delta)
        return every.flatten(1).mean(1) if every.dim() > 1 else every

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return sums of the errors, and the exact ones of the targets (see `_exact_sums`)."""
        wanted = targets.reshape(len(targets), -1)
        errors = outputs.double().reshape(wanted.shape) - wanted.double()
        return {
            "examples": torch.tensor(len(wanted), device=outputs.device),
            "squares": errors.square().sum(0),
            "sizes": errors.abs().sum(0),
            "targets": _exact_sums(wanted),
        }

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Return RMSE, MAE and R2."""
        examples, squares = int(sums["examples"]), sums["squares"].tolist()
        numbers = examples * len(squares)
        explained = [
            _explained(square, exact, examples)
            for square, exact in zip(squares, sums["targets"], strict=True)
        ]
        return {
            "rmse": math.sqrt(ratio(math.fsum(squares), numbers)),
            "mae": ratio(math.fsum(sums["sizes"].tolist()), numbers),
            "r2": ratio(math.fsum(explained), len(explained)),
        }


_LOSSES = ("mse", "mae", "huber")

# A float32 is a mantissa of 24 bits times a power of two from 2**-149 - of subnormal numbers - on.
_MANTISSA = 24
_LOWEST = -148
_EXPONENTS = 128 - _LOWEST + 1
_HALF = 12


def _exact_sums(targets: Tensor) -> Tensor:
    """Return sums of float32 `targets` (N, K) and of their squares that lose nothing, int64.

    A variance is a difference, of which rounding may leave nothing where the mean is large. So the
    mantissas are summed as whole numbers, those of each exponent apart, and for the squares in two
    halves, whose products are small: (K, exponents, 4) sums of m, a², ab and b² with m = a 2**12 +
    b. Of 2**39 examples none overflows.
    """
    fraction, exponent = torch.frexp(targets)
    mantissa = (fraction.double() * 2**_MANTISSA).long()
    high = mantissa >> _HALF
    low = mantissa - (high << _HALF)
    parts = torch.stack([mantissa, high * high, high * low, low * low], -1)
    place = (exponent.long() - _LOWEST).clamp_(0, _EXPONENTS - 1)
    sums = parts.new_zeros(_EXPONENTS, *parts.shape[1:])
    sums.scatter_add_(0, place.unsqueeze(-1).expand_as(parts), parts)
    return sums.movedim(0, 1)


def _explained(squares: float, exact: Tensor, examples: int) -> float:
    """Return 1 minus the sum of squared errors over that of the deviations from the mean."""
    if examples < 2:
        return math.nan
    total = square = Fraction(0)
    for place in exact.any(1).nonzero().flatten().tolist():
        unit = Fraction(2) ** (place + _LOWEST - _MANTISSA)
        mantissa, high, mixed, low = exact[place].tolist()
        total += mantissa * unit
        square += ((high << 2 * _HALF) + (mixed << (_HALF + 1)) + low) * unit * unit
    varied = float(square - total * total / examples)
    if not varied:
        return 1.0 if not squares else 0.0
    return 1.0 - squares / varied
