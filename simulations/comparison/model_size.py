"""How large the models of a grid are, in a sentence for its first screen."""

from __future__ import annotations

from fedkn.experiment import network_of
from fedkn.text import printable
from simulations.comparison.grid import GridConfig, groups, result_cells

__all__ = ["model_sentence"]


def model_sentence(grid: GridConfig) -> str:
    """Return the model's name and its parameters: a span where normalizers differ in them.

    Of the first point, where `grid` has further axes.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for group in groups(grid):
        if group.normalizer not in sizes:
            config = result_cells(grid, group, grid.compare.learning_rates[0])[0].config
            record = network_of(config).record()
            sizes[group.normalizer] = record["trained"], record["parameters"]
    trained, whole = (sorted({pair[place] for pair in sizes.values()}) for place in (0, 1))
    name = printable(grid.model.name, 80)
    if trained == whole:
        return f"Model {name}: {_span(whole)} parameters."
    return f"Model {name}: {_span(whole)} parameters, {_span(trained)} of them trained."


def _span(sizes: list[int]) -> str:
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
