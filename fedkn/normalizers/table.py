"""The tables of docs/normalizers.md, made of what the classes declare about themselves."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from fedkn.normalizers import FederationRule, Normalizer, TensorRole, create, names

__all__ = ["markdown"]

_COLUMNS = ("name", "what it is", "statistics over", "smallest batch", "in a round", "not for")
_MORE = (
    "name",
    "in reports",
    "options",
    "scale and bias",
    "examples of a batch",
    "clients",
    "pixels",
    "paper",
)
_LATE = 10**6  # a round by which whatever changes in the course of a run has changed


def markdown() -> str:
    """Return the two tables: a row for every normalizer, in the order of the registry."""
    every = [create(name) for name in names()]
    first = _table(_COLUMNS, [_row(normalizer) for normalizer in every])
    return f"{first}\n{_table(_MORE, [_more(normalizer) for normalizer in every])}"


def _row(normalizer: Normalizer) -> list[str]:
    return [
        f"`{normalizer.name}`",
        _first_line(normalizer),
        normalizer.statistics,
        str(normalizer.minimum_batch),
        _in_a_round(normalizer),
        normalizer.not_for,
    ]


def _more(normalizer: Normalizer) -> list[str]:
    return [
        f"`{normalizer.name}`",
        normalizer.title,
        ", ".join(f"`{name} = {_shown(value)}`" for name, value in normalizer.options().items()),
        "yes" if normalizer.affine else "",
        "mixed" if normalizer.mixes_examples else "apart",
        "stacked" if normalizer.together else "one by one",
        normalizer.published_scaling,
        normalizer.paper,
    ]


def _first_line(normalizer: Normalizer) -> str:
    """Return the first line of the file that its class is in."""
    text = inspect.getdoc(sys.modules[type(normalizer).__module__]) or ""
    return text.partition("\n")[0].removesuffix(".")


def _in_a_round(normalizer: Normalizer) -> str:
    """Return the roles of the tensors of its layers, for each rule that its options can give."""
    found: dict[str, list[str]] = {}
    for settings in normalizer.rule_settings:
        which = ", ".join(f"`{name} = {_shown(value)}`" for name, value in settings.items())
        found.setdefault(_roles_of(normalizer.with_settings(**settings)), []).append(which)
    if len(found) == 1:
        return "".join(found)
    return "; ".join(f"{' or '.join(which)}: {roles}" for roles, which in found.items())


def _roles_of(normalizer: Normalizer) -> str:
    block = normalizer.conv_norm(4, 4, 3, activation="relu")
    layers = nn.ModuleDict({"block": block, "head": normalizer.before_head() or nn.Identity()})
    first, last = (_exceptions(normalizer.federation_rule(layers, round)) for round in (1, _LATE))
    return first if first == last else f"at first {first}; later {last}"


def _exceptions(rule: FederationRule) -> str:
    """Return what becomes of the tensors that are not shared."""
    found: dict[TensorRole, list[str]] = {}
    for name, role in rule.items():
        if role is not TensorRole.SHARED:
            found.setdefault(role, []).append(f"`{name.partition('.')[2]}`")
    others = (f"{', '.join(tensors)} ({role})" for role, tensors in found.items())
    return f"all shared but {', '.join(others)}" if found else "all shared"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", text)
