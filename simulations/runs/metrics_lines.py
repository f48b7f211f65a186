"""The lines of metrics.jsonl: what each kind must hold.

docs/run-folder.md describes them. Fields that later versions added are missing in older runs.
`parsed` is the one place where a line is checked: whoever reads what it returns may rely on every
field's type and range, and finds lines of older runs as they are written now.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from fedkn.tasks.metric import ACCURACY, Metric
from fedkn.text import printable
from simulations.runs.model_record import is_model
from simulations.runs.results import LARGEST_NUMBER, metric_of, number

__all__ = ["parsed"]


def parsed(text: bytes, judged_by: dict[str, Metric] | None = None) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, None where it is malformed.

    That is: no JSON object, nested too deeply, of an unknown kind, without a required field, or
    with one of another type or beyond its range. Errors and reasons are made printable.

    `judged_by` has by cell the metric that earlier lines told; a line which begins a cell adds its
    own. Whatever is not in it is judged by accuracy. An ``evaluation`` gets the ``value`` of that
    metric.
    """
    judged_by = {} if judged_by is None else judged_by
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
    _as_written_now(line)
    checks = {**required, **optional}
    if not required.keys() <= line.keys() or not all(
        check(line[name]) for name, check in checks.items() if name in line
    ):
        return None
    if "task" in line:
        judged_by[line["cell"]] = metric_of(line)
    if not _judged(line, judged_by.get(line["cell"], ACCURACY)):
        return None
    for name in ("error", "text"):
        if name in line:
            line[name] = printable(line[name], _LONGEST)
    for loss in (*line.get("refused", ()), *line.get("failed", ())):
        loss["reason"] = printable(loss["reason"], _LONGEST)
    return line


def _as_written_now(line: dict[str, Any]) -> None:
    """Give a line of a run from before there were tasks what it would have now."""
    if line["kind"] == "evaluation" and "metrics" not in line and "accuracy" in line:
        line["metrics"] = {ACCURACY.name: line["accuracy"]}
    if line["kind"] == "client_evaluation" and isinstance(line.get("clients"), list):
        for of in line["clients"]:
            if _is_old_client_result(of):
                of["value"] = of["correct"] / of["examples"]


def _judged(line: dict[str, Any], metric: Metric) -> bool:
    """Whether a line's values of the deciding `metric` are possible; an evaluation gets its own."""
    if line["kind"] == "evaluation":
        if metric.name not in line["metrics"]:
            return False
        line["value"] = line["metrics"][metric.name]
        return _is_value(line["value"], metric)
    if line["kind"] == "client_evaluation":
        values = [line["mean"], line["worst_tenth"], *(of["value"] for of in line["clients"])]
        return all(_is_value(value, metric) for value in values)
    return True


_LARGEST_COUNT = 2**53  # beyond, a float is not exact
_LONGEST = 1000
_LONGEST_NAME = 200
_MOST_METRICS = 1000


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
    return usable and 0 <= value <= LARGEST_NUMBER


def _is_value(value: Any, metric: Metric) -> bool:
    """Whether it is a number that `metric` can have, or says that there is none."""
    return _is_number(value) and (
        math.isnan(number(value)) or metric.lowest <= number(value) <= metric.highest
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and value.isprintable()


def _is_bound(value: Any) -> bool:
    """Whether it is a number, or null, which says that there is no bound."""
    return value is None or (_is_number(value) and abs(value) <= LARGEST_NUMBER)


def _is_task(value: Any) -> bool:
    names = {"name", "metric", "higher_is_better", "lowest", "highest", "unit"}
    return (
        isinstance(value, dict)
        and names <= value.keys()
        and _is_name(value["name"])
        and _is_name(value["metric"])
        and isinstance(value["higher_is_better"], bool)
        and (value["unit"] == "" or _is_name(value["unit"]))
        and _is_bound(value["lowest"])
        and _is_bound(value["highest"])
        and (None in (value["lowest"], value["highest"]) or value["lowest"] <= value["highest"])
    )


def _by_metric(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def sound(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and len(value) <= _MOST_METRICS
            and all(_is_name(name) and check(of) for name, of in value.items())
        )

    return sound


def _is_confusion(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == len(value) and all(map(_is_count, row))
        for row in value
    )


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
        and {"client", "examples", "value", "loss"} <= value.keys()
        and all(_is_count(value[name]) for name in ("client", "examples"))
        and value["examples"] > 0
        and _is_number(value["value"])
        and _is_number(value["loss"])
    )


def _is_old_client_result(value: Any) -> bool:
    """Whether it is one from before there were tasks: so many `correct` of its `examples`."""
    return (
        isinstance(value, dict)
        and "value" not in value
        and {"examples", "correct"} <= value.keys()
        and all(_is_count(value[name]) for name in ("examples", "correct"))
        and value["correct"] <= value["examples"]
        and value["examples"] > 0
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
        {
            **dict.fromkeys(("parameters", "tensors", "local_tensors"), _is_count),
            "task": _is_task,
            "model": is_model,
            "device": _is_name,
        },
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
            "metrics": _by_metric(_is_number),
            "loss": _is_number,
            "examples": _is_count,
        },
        {"by_class": _by_metric(_list_of(_is_number)), "confusion": _is_confusion},
    ),
    "client_evaluation": (
        {
            "round": _is_count,
            "split": _SPLIT,
            **dict.fromkeys(("mean", "worst_tenth", "deviation", "loss"), _is_number),
            "clients": _list_of(_is_client_result),
            "failed": _list_of(_is_loss),
        },
        {},
    ),
    "waiting": (
        {"round": _is_count, "clients": _list_of(_is_count), "seconds": _is_amount},
        {"heartbeats": _by_client(_is_amount)},
    ),
    "warning": ({"text": _is_text}, {}),
    "memory": ({"peak_bytes": _is_count}, {}),
    "resume": ({"round": _is_count}, {"task": _is_task, "device": _is_name}),
    "end": (
        {"status": _one_of("completed", "failed", "untrainable")},
        {
            **dict.fromkeys(("seconds", "best_value"), _is_number),
            **dict.fromkeys(("rounds", "best_round"), _is_count),
            "weights_sha256": _is_hash,
            "error": _is_text,
            "config": _is_config,
        },
    ),
}
"""By kind the fields that a line must have, and those that it may have, each with its check."""
