"""What a run dropped, refused or lost, and why: nothing is dropped in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from simulations.report.formats import count
from simulations.report.verdict import enumerated
from simulations.runs.records import CellRecord
from simulations.runs.results import Round

__all__ = ["HARMLESS", "LossLine", "losses", "named_clients"]

_DIVIDED = "divided batches"
_WARNINGS = "warnings"
HARMLESS = (_DIVIDED, _WARNINGS)
"""Nothing is lost by these: parts too small for the normalizer are among the skipped batches, and
warnings are of what only watches a run."""


@dataclass(frozen=True)
class LossLine:
    """One line of the table: what happened, to whom, how often, and why."""

    what: str
    normalizer: str
    batch_size: int
    amount: str
    why: str


def losses(cells: Sequence[CellRecord], damaged_lines: int) -> list[LossLine]:
    """Return every loss of `cells`, the gravest kind first; empty if nothing was lost."""
    by_entry: dict[tuple[str, int], list[CellRecord]] = {}
    for cell in cells:
        key = (cell.config.normalizer.name, cell.config.train.batch_size)
        by_entry.setdefault(key, []).append(cell)
    lines = [
        LossLine(what, *key, *found)
        for what, look in _KINDS.items()
        for key, of_entry in sorted(by_entry.items(), key=lambda item: item[0][1])
        if (found := look(of_entry))
    ]
    if damaged_lines:
        why = "cut short by a kill, or not written by this fedkn"
        lines.append(LossLine("unreadable lines", "", 0, count(damaged_lines, "line"), why))
    return lines


def named_clients(clients: Collection[int | None]) -> str:
    """Return "client 3", "clients 1, 2 and 9", or the first of many and how many others.

    None stands for one that nobody knows.
    """
    known = sorted(client for client in clients if client is not None)
    shown = [str(client) for client in known[:_CLIENTS_SHOWN]]
    if len(known) > len(shown):
        shown.append(f"{len(known) - len(shown)} others")
    if None in clients:
        shown.append("unknown")
    return f"client{'s' if len(clients) > 1 else ''} {enumerated(shown)}"


def _untrainable(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    return _ended(cells, "untrainable", "needs larger batches")


def _failed_cells(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    return _ended(cells, "failed", "no reason was written")


def _ended(cells: Sequence[CellRecord], status: str, otherwise: str) -> tuple[str, str] | None:
    ended = [cell for cell in cells if cell.status == status]
    reasons = Counter(cell.error or otherwise for cell in ended)
    return (count(len(ended), "cell"), _listed(reasons)) if ended else None


def _no_number(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    rounds = [r for r in _rounds(cells) if r.updates and not abs(r.train_loss) < float("inf")]
    why = "the training loss was NaN or infinite"
    return (count(len(rounds), "round"), why) if rounds else None


def _failed_clients(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    reasons = Counter(loss.reason for r in _rounds(cells) for loss in r.failed)
    clients = {loss.client for r in _rounds(cells) for loss in r.failed}
    return _of_clients("time", reasons, clients)


def _refused_updates(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    reasons = Counter(loss.reason for r in _rounds(cells) for loss in r.refused)
    clients = {loss.client for r in _rounds(cells) for loss in r.refused}
    return _of_clients("update", reasons, clients)


def _lost_states(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    clients = [client for r in _rounds(cells) for client in r.state_lost]
    why = "what the client keeps between rounds was gone, and it began anew"
    return _of_clients("time", Counter({why: len(clients)} if clients else {}), set(clients))


def _changed_data(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    clients = [client for r in _rounds(cells) for client in r.data_changed]
    why = "the client's own images were others than in its first round"
    return _of_clients("update", Counter({why: len(clients)} if clients else {}), set(clients))


def _late(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    clients = [client for r in _rounds(cells) for client in r.late]
    why = "the round had enough updates and did not wait (server.enough_updates)"
    return _of_clients("update", Counter({why: len(clients)} if clients else {}), set(clients))


def _not_evaluated(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    failed = [loss for c in cells if c.client_evaluation for loss in c.client_evaluation.failed]
    reasons = Counter(loss.reason for loss in failed)
    return _of_clients("time", reasons, {loss.client for loss in failed})


def _of_clients(
    noun: str, reasons: Counter[str], clients: Collection[int | None]
) -> tuple[str, str] | None:
    if not reasons:
        return None
    return f"{count(reasons.total(), noun)} ({named_clients(clients)})", _listed(reasons)


def _unanswered(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    silent = sum(
        max(0, len(r.cohort) - r.updates - len(r.refused) - len(r.failed) - len(r.late))
        for r in _rounds(cells)
    )
    why = "the client was asked and nothing came back"
    return (count(silent, "update"), why) if silent else None


def _skipped(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    rounds = list(_rounds(cells))
    batches = sum(r.skipped_batches for r in rounds)
    if not batches:
        return None
    skipped = sum(r.skipped_examples for r in rounds)
    trained = sum(r.examples for r in rounds)
    share = 100 * skipped / max(1, skipped + trained)
    amount = f"{count(batches, 'batch').replace('batchs', 'batches')}, {share:.2g}% of the examples"
    return amount, "the last batch of a local epoch was too small for the normalizer"


def _divided(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    rounds = [r for r in _rounds(cells) if r.batch_sizes]
    clients = {client for r in rounds for client in r.batch_sizes}
    sizes = sorted({size for r in rounds for size in r.batch_sizes.values()})
    why = (
        f"their devices bear batches of {enumerated(sizes)} at most; the steps took the "
        "same examples in more parts"
    )
    updates = sum(len(r.batch_sizes) for r in rounds)
    return _of_clients("update", Counter({why: updates} if updates else {}), clients)


def _warnings(cells: Sequence[CellRecord]) -> tuple[str, str] | None:
    reasons = Counter(warning for cell in cells for warning in cell.warnings)
    return (count(reasons.total(), "time"), _listed(reasons)) if reasons else None


_KINDS: dict[str, Callable[[Sequence[CellRecord]], tuple[str, str] | None]] = {
    "failed cells": _failed_cells,
    "untrainable cells": _untrainable,
    "rounds with a loss that is no number": _no_number,
    "failed clients": _failed_clients,
    "refused updates": _refused_updates,
    "clients that lost their state": _lost_states,
    "clients whose data changed": _changed_data,
    "own models not evaluated": _not_evaluated,
    "unanswered requests": _unanswered,
    "late updates": _late,
    "skipped batches": _skipped,
    _DIVIDED: _divided,
    _WARNINGS: _warnings,
}
_CLIENTS_SHOWN = 6
_REASONS_SHOWN = 3


def _rounds(cells: Iterable[CellRecord]) -> Iterable[Round]:
    return (entry for cell in cells for entry in cell.rounds)


def _listed(reasons: Counter[str]) -> str:
    """The most frequent reasons, with their counts where there are several."""
    common = reasons.most_common(_REASONS_SHOWN)
    if len(reasons) == 1:
        return common[0][0]
    texts = [f"{reason} ({number}×)" for reason, number in common]
    rest = len(reasons) - len(common)
    return "; ".join([*texts, f"and {count(rest, 'other reason')}"] if rest else texts)
