"""The lines of metrics.jsonl: what each kind must hold, and what they read as.

docs/run-folder.md describes them. Fields that later versions added are missing in older runs.
`parsed` is the one place where a line is checked: whoever reads what it returns may rely on every
field's type and range.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedkn.text import printable

__all__ = [
    "ClientEvaluation",
    "ClientResult",
    "Evaluation",
    "Holding",
    "Loss",
    "Round",
    "client_evaluation_of",
    "evaluation_of",
    "holdings_of",
    "number",
    "parsed",
    "round_of",
]


@dataclass(frozen=True)
class Loss:
    """A client that did not count in a round or an evaluation, and why.

    `client` is None where nobody could tell whose reply it was.
    """

    client: int | None
    reason: str


@dataclass(frozen=True)
class Round:
    """One round of a cell, as its server reported it. Units as in docs/run-folder.md.

    `late`: clients whose reply was not waited for. `state_lost`: clients that began anew because
    what they keep between rounds was gone. `epsilon`: what each client that trained with
    differential privacy has spent so far, infinite without noise. `batch_sizes`: those of devices
    that could not bear the one asked for. `data_changed`: clients whose own images are others than
    in their first round.
    """

    round: int
    seconds: float
    cohort: tuple[int, ...]
    updates: int
    examples: int
    steps: int
    skipped_batches: int
    skipped_examples: int
    refused: tuple[Loss, ...]
    failed: tuple[Loss, ...]
    train_loss: float
    bytes_down: int
    bytes_up: int
    train_seconds: float
    learning_rate: float
    late: tuple[int, ...] = ()
    state_lost: tuple[int, ...] = ()
    epsilon: Mapping[int, float] = field(default_factory=dict)
    batch_sizes: Mapping[int, int] = field(default_factory=dict)
    data_changed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Holding:
    """What a client said on joining that it holds to train on.

    `labels`: examples by class (an index); None where it said no more than their number.
    """

    client: int
    examples: int
    labels: Mapping[int, int] | None


@dataclass(frozen=True)
class Evaluation:
    """The global model's accuracy (0 to 1) and loss on one split after a round."""

    round: int
    split: str
    accuracy: float
    loss: float
    examples: int


@dataclass(frozen=True)
class ClientResult:
    """One client's own model on the images that it keeps: `correct` of `examples`, mean loss."""

    client: int
    examples: int
    correct: int
    loss: float

    @property
    def accuracy(self) -> float:
        """The fraction of its images that it classifies correctly."""
        return self.correct / self.examples


@dataclass(frozen=True)
class ClientEvaluation:
    """Every client's own model on its own images of one split, after the last round.

    `mean`, `worst_tenth` (mean of the tenth of the clients that do worst) and `deviation` are of
    the clients' accuracies (0 to 1), each client counting once; NaN where no client answered.
    """

    round: int
    split: str
    mean: float
    worst_tenth: float
    deviation: float
    loss: float
    clients: tuple[ClientResult, ...]
    failed: tuple[Loss, ...]


def parsed(text: bytes) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, None where it is malformed.

    That is: no JSON object, nested too deeply, of an unknown kind, without a required field, or
    with one of another type or beyond its range. Errors and reasons are made printable.
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not _is_cell(line.get("cell")):
        return None
    kind = line.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        return None
    required, optional = _KINDS[kind]
    if not required.keys() <= line.keys():
        return None
    checks = {**required, **optional}
    if not all(check(line[name]) for name, check in checks.items() if name in line):
        return None
    if "error" in line:
        line["error"] = printable(line["error"], _LONGEST)
    for loss in (*line.get("refused", ()), *line.get("failed", ())):
        loss["reason"] = printable(loss["reason"], _LONGEST)
    return line


def round_of(line: Mapping[str, Any]) -> Round:
    """Return the round that a line of kind ``round`` tells of."""
    return Round(
        round=line["round"],
        seconds=number(line["seconds"]),
        cohort=tuple(line["cohort"]),
        updates=line["updates"],
        examples=line["examples"],
        steps=line["steps"],
        skipped_batches=line["skipped_batches"],
        skipped_examples=line["skipped_examples"],
        refused=_losses(line["refused"]),
        failed=_losses(line["failed"]),
        train_loss=number(line["train_loss"]),
        bytes_down=line["bytes_down"],
        bytes_up=line["bytes_up"],
        train_seconds=number(line["train_seconds"]),
        learning_rate=number(line["learning_rate"]),
        late=tuple(line.get("late", ())),
        state_lost=tuple(line.get("state_lost", ())),
        # JSON has no infinity: an epsilon without bound is written as null.
        epsilon={
            int(client): math.inf if value is None else float(value)
            for client, value in line.get("epsilon", {}).items()
        },
        batch_sizes={int(client): n for client, n in line.get("batch_sizes", {}).items()},
        data_changed=tuple(line.get("data_changed", ())),
    )


def holdings_of(line: Mapping[str, Any]) -> list[Holding]:
    """Return what a line of kind ``joined`` tells of the clients that have joined."""
    return [
        Holding(
            of["client"],
            of["examples"],
            None if of["labels"] is None else {int(i): n for i, n in of["labels"].items()},
        )
        for of in line["clients"]
    ]


def evaluation_of(line: Mapping[str, Any]) -> Evaluation:
    """Return what a line of kind ``evaluation`` tells of the global model."""
    accuracy, loss = number(line["accuracy"]), number(line["loss"])
    return Evaluation(line["round"], line["split"], accuracy, loss, line["examples"])


def client_evaluation_of(line: Mapping[str, Any]) -> ClientEvaluation:
    """Return what a line of kind ``client_evaluation`` tells of the clients' own models."""
    return ClientEvaluation(
        round=line["round"],
        split=line["split"],
        mean=number(line["mean"]),
        worst_tenth=number(line["worst_tenth"]),
        deviation=number(line["deviation"]),
        loss=number(line["loss"]),
        clients=tuple(
            ClientResult(of["client"], of["examples"], of["correct"], number(of["loss"]))
            for of in line["clients"]
        ),
        failed=_losses(line["failed"]),
    )


def number(value: float | None) -> float:
    """Return a number of a line as a float: JSON has no NaN, and the log writes null.

    So does what is infinite, or larger than any loss can be and have a square: nobody can compute
    with it.
    """
    return math.nan if value is None or abs(value) > _LARGEST_NUMBER else float(value)


def _losses(losses: Iterable[Mapping[str, Any]]) -> tuple[Loss, ...]:
    return tuple(Loss(loss["client"], loss["reason"]) for loss in losses)


# -- what is a sound value ------------------------------------------------------------------------

_LARGEST_COUNT = 2**53  # beyond, a float is not exact
_LARGEST_NUMBER = 1e39  # beyond every float32; its square is still a float
_LONGEST = 1000


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and bool(_HASH.fullmatch(value))


def _is_cell(value: Any) -> bool:
    """Whether it names a cell: it is part of paths, too."""
    sound = isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()
    return sound and not set(value) & set("/\\") and value not in (".", "..")


def _is_count(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and 0 <= value <= _LARGEST_COUNT


def _is_number(value: Any) -> bool:
    """Whether it is a number, NaN and null included, which both say that there is none."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_amount(value: Any) -> bool:
    """Whether it is a number that is there, finite and not negative."""
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return usable and 0 <= value <= _LARGEST_NUMBER


def _is_share(value: Any) -> bool:
    return _is_number(value) and (math.isnan(number(value)) or 0 <= number(value) <= 1)


def _one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in values


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _by_client(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def sound(value: Any) -> bool:
        return isinstance(value, dict) and all(
            _CLIENT.fullmatch(key) and check(of_client) for key, of_client in value.items()
        )

    return sound


def _is_loss(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"client", "reason"} <= value.keys()
        and (value["client"] is None or _is_count(value["client"]))
        and _is_text(value["reason"])
    )


def _is_client_result(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"client", "examples", "correct", "loss"} <= value.keys()
        and all(_is_count(value[name]) for name in ("client", "examples", "correct"))
        and value["correct"] <= value["examples"]
        and value["examples"] > 0
        and _is_number(value["loss"])
    )


def _is_holding(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"client", "examples", "labels"} <= value.keys()
        and _is_count(value["client"])
        and _is_count(value["examples"])
        and (value["labels"] is None or _by_client(_is_count)(value["labels"]))
    )


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(setting, str | int | float | bool) for setting in value.values()
    )


_CLIENT = re.compile(r"[0-9]{1,15}")
_HASH = re.compile(r"[0-9a-f]{1,128}")
_SPLIT = _one_of("test", "validation")
_Checks = Mapping[str, Callable[[Any], bool]]

_KINDS: dict[str, tuple[_Checks, _Checks]] = {
    "start": (
        {"purpose": _one_of("search", "result"), "config": _is_config},
        dict.fromkeys(("parameters", "tensors", "local_tensors"), _is_count),
    ),
    "joined": ({"clients": _list_of(_is_holding)}, {"round": _is_count}),
    "round": (
        {
            **dict.fromkeys(("round", "updates", "examples", "steps"), _is_count),
            **dict.fromkeys(("skipped_batches", "skipped_examples"), _is_count),
            **dict.fromkeys(("bytes_down", "bytes_up"), _is_count),
            "seconds": _is_amount,
            "cohort": _list_of(_is_count),
            "refused": _list_of(_is_loss),
            "failed": _list_of(_is_loss),
            "train_loss": _is_number,
            "train_seconds": _is_number,
            "learning_rate": _is_number,
        },
        {
            "late": _list_of(_is_count),
            "state_lost": _list_of(_is_count),
            "epsilon": _by_client(_is_number),
            "batch_sizes": _by_client(_is_count),
            "data_changed": _list_of(_is_count),
            "waiting_seconds": _is_amount,
            "waited_for": _list_of(_is_count),
        },
    ),
    "evaluation": (
        {
            "round": _is_count,
            "split": _SPLIT,
            "accuracy": _is_share,
            "loss": _is_number,
            "examples": _is_count,
        },
        {},
    ),
    "client_evaluation": (
        {
            "round": _is_count,
            "split": _SPLIT,
            **dict.fromkeys(("mean", "worst_tenth"), _is_share),
            **dict.fromkeys(("deviation", "loss"), _is_number),
            "clients": _list_of(_is_client_result),
            "failed": _list_of(_is_loss),
        },
        {},
    ),
    "waiting": (
        {"round": _is_count, "clients": _list_of(_is_count), "seconds": _is_amount},
        {"heartbeats": _by_client(_is_amount)},
    ),
    "memory": ({"peak_bytes": _is_count}, {}),
    "resume": ({"round": _is_count}, {}),
    "end": (
        {"status": _one_of("completed", "failed", "untrainable")},
        {"seconds": _is_number, "weights_sha256": _is_hash, "error": _is_text},
    ),
}
"""By kind the fields that a line must have, and those that it may have, each with its check."""
