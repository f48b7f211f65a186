"""How the networks of a run came about: what was converted, frozen, or taken from given weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulations.runs.model_record import ModelRecord
from simulations.runs.records import CellRecord

__all__ = ["Origin", "origins"]


@dataclass(frozen=True)
class Origin:
    """The model of the normalizers `names`, for all of which it came about in the same way."""

    names: list[str]
    model: ModelRecord

    @property
    def told(self) -> bool:
        """Whether there is more to say than how many parameters it has."""
        of = self.model
        return bool(of.conversion or of.frozen_tensors or of.weights_sha256)


def origins(cells: Sequence[CellRecord]) -> list[Origin]:
    """Return how the models of `cells` came about, those of equal models together."""
    found: dict[ModelRecord, list[str]] = {}
    for cell in cells:
        if cell.model is not None:
            names = found.setdefault(cell.model, [])
            if cell.config.normalizer.name not in names:
                names.append(cell.config.normalizer.name)
    return [Origin(names, model) for model, names in found.items()]
