"""What a reader must know of a run before its numbers: of what, how many, how often."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedkn.config import ExperimentConfig
from fedkn.models.catalog import ARCHITECTURES
from simulations.report.endings import until
from simulations.report.summary import RunSummary
from simulations.runs.records import CellRecord

__all__ = ["Fact", "facts", "judged_by"]


@dataclass(frozen=True)
class Fact:
    """One fact of the first screen: `name` is what it is about, `more` what may be left out."""

    name: str
    text: str
    more: str = ""


def facts(summary: RunSummary) -> list[Fact]:
    """Return the facts of a run, of one that has not begun as far as they are known."""
    cells = summary.results or summary.cells
    configs = [cell.config for cell in cells] or [ExperimentConfig.resolve(summary.grid.experiment)]
    found = [
        *_data(summary),
        Fact("task", _listed(config.task.name for config in configs), _decides(cells)),
        _model(configs),
        Fact("parameters", _parameters(cells), _untrained(cells)),
        Fact("clients", _listed(config.partition.clients for config in configs), _schemes(summary)),
        Fact("cohort", f"{_listed(config.cohort for config in configs)} a round"),
        _rounds(configs),
        Fact("seeds", f"{len(summary.grid.seeds)}", _spelled(summary.grid.seeds)),
        Fact("engine", _engines(cells)),
        Fact("computed on", *_devices(summary)),
    ]
    return [fact for fact in found if fact.text]


def judged_by(cells: Sequence[CellRecord]) -> str:
    """Return in words by what the models of `cells` are judged, and which way."""
    metrics = dict.fromkeys(cell.metric for cell in cells)
    return ", ".join(
        f"{metric.name}, {'higher' if metric.higher_is_better else 'lower'} is better"
        for metric in metrics
    )


def _decides(cells: Sequence[CellRecord]) -> str:
    decided = judged_by(cells)
    return f"judged by {decided}" if decided else ""


def _data(summary: RunSummary) -> list[Fact]:
    found = []
    for entry in summary.folder.data():
        of = entry.summary
        counts = "counts unknown"
        if of.fingerprint:
            training, validation, test = of.fingerprint.counts
            counts = f"{training:,} to train on, {validation:,} to validate, {test:,} to test"
        shape = "×".join(map(str, of.shape))
        classes = f", {len(of.classes)} classes" if of.classes else ""
        found.append(Fact("data", str(entry.settings["source"]), f"{counts}; {shape}{classes}"))
    if not found and summary.grid.experiment.get("data.source"):
        found.append(Fact("data", str(summary.grid.experiment["data.source"])))
    return found


def _model(configs: Sequence[ExperimentConfig]) -> Fact:
    names = _listed(config.model.name for config in configs)
    # How wide a model of somebody's own is, its factory alone knows.
    ours = [config.model.width for config in configs if config.model.name in ARCHITECTURES]
    widths = _listed(f"width {width}" if width else "published width" for width in ours)
    return Fact("model", names, widths)


def _parameters(cells: Sequence[CellRecord]) -> str:
    counts = sorted({cell.parameters for cell in cells if cell.parameters is not None})
    return _range(counts) if counts else ""


def _range(ordered: Sequence[int]) -> str:
    first, last = ordered[0], ordered[-1]
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _untrained(cells: Sequence[CellRecord]) -> str:
    """How many parameters there are where not all of them are trained."""
    wholes = sorted({of.parameters for cell in cells if (of := cell.model) is not None})
    partly = any(of.trained < of.parameters for cell in cells if (of := cell.model) is not None)
    return f"trained, of {_range(wholes)}" if partly else ""


def _schemes(summary: RunSummary) -> str:
    """The partitions, without the number of clients where all have the same."""
    labels = list(dict.fromkeys(section.partition for section in summary.sections))
    ends = {label.partition(", ")[2] for label in labels}
    return "; ".join(label.partition(", ")[0] if len(ends) == 1 else label for label in labels)


def _rounds(configs: Sequence[ExperimentConfig]) -> Fact:
    rounds, work = _listed(config.rounds for config in configs), _local_work(configs)
    criterion = until(config.evaluation.patience for config in configs)
    if not criterion:
        return Fact("rounds", rounds, work)
    return Fact("rounds", f"at most {rounds}", f"{work}; until {criterion}")


def _local_work(configs: Sequence[ExperimentConfig]) -> str:
    steps = {config.train.local_steps for config in configs}
    epochs = {config.train.local_epochs for config in configs}
    if steps != {0}:
        return f"of at most {_listed(sorted(steps))} local steps"
    return f"of {_listed(sorted(epochs))} local epoch{'' if epochs == {1} else 's'}"


def _engines(cells: Sequence[CellRecord]) -> str:
    return _listed(c.config.engine for c in cells if c.status != "untrainable")


def _devices(summary: RunSummary) -> tuple[str, str]:
    """The models of the devices that the cells of a simulation ran on, and which of them."""
    cells = [] if summary.grid.deployed else summary.results or summary.cells
    names = dict.fromkeys(name for cell in cells for name in cell.devices)
    models = _listed(name.partition(", GPU ")[0] for name in names)
    which = sorted({name.partition(", GPU ")[2] for name in names} - {""})
    return models, f"GPU {', '.join(which)}" if which else ""


def _spelled(seeds: Sequence[int]) -> str:
    ordered = sorted(seeds)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
