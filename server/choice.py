"""Which round has the best model, and since when none was better: judged on validation images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from fedkn.tasks.metric import Metric

__all__ = ["Choice"]


@dataclass(frozen=True, eq=False)
class Choice:
    """The best model of a run so far.

    Never by test images: of many looks at them the best would flatter. A tie goes to the earlier
    round, and a value that is not a number is never the best.

    Attributes:
        round_: the round that made it, 0 while there is none.
        value: the task's metric on the validation images. waited: evaluations since.
        tensors: its global tensors, where they are kept (``checkpoint.best``).
    """

    round_: int = 0
    value: float = math.nan
    waited: int = 0
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def after(
        self,
        round_: int,
        value: float,
        tensors: Mapping[str, np.ndarray],
        *,
        metric: Metric,
        keep: bool,
    ) -> Choice:
        """Return the choice after an evaluation of `tensors`, those of `round_`."""
        if metric.better(value, self.value):
            return Choice(round_, value, 0, dict(tensors) if keep else {})
        return Choice(self.round_, self.value, self.waited + 1, self.tensors)

    def to_record(self) -> dict[str, Any]:
        """Return all but the tensors, as JSON holds it."""
        value = None if math.isnan(self.value) else self.value
        return {"round": self.round_, "value": value, "waited": self.waited}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Self:
        """Return the choice of a record."""
        value = math.nan if record["value"] is None else float(record["value"])
        return cls(int(record["round"]), value, int(record["waited"]), dict(tensors))
