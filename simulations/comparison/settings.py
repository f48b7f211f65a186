"""The ``[compare]`` table: the axes of a comparison, and how it is carried out."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fedkn.sections import Positive, Scalar, Section

__all__ = ["LARGEST_SEED_COUNT", "CompareConfig"]

LARGEST_SEED_COUNT = 1000
"""Seeds of searches are so much larger than those of results, so that no two are the same."""


def _entries(value: Any) -> Any:
    """Split ``"a,b"`` as a command line gives it; drop repetitions, keep the order."""
    if isinstance(value, str):
        value = [entry.strip() for entry in value.split(",") if entry.strip()]
    elif isinstance(value, (int, float)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    if any(isinstance(entry, (list, dict)) for entry in value):
        raise ValueError("must be a list of plain values")
    return list(dict.fromkeys(value))


def _safe_name(value: Any) -> Any:
    if isinstance(value, str) and value and not re.fullmatch(r"\w[\w.+-]*", value):
        raise ValueError("use letters, digits, '.', '_', '+' and '-' only")
    return value


Entries = BeforeValidator(_entries)


class CompareConfig(Section):
    """The axes of a comparison, and how it is carried out."""

    name: Annotated[str, BeforeValidator(_safe_name)] = Field(
        "", description="name of the run folder under runs/ (empty: command and time)"
    )
    normalizers: Annotated[tuple[str, ...], Entries, Field(min_length=1)] = Field(
        ("kernel", "group", "ws_group", "batch", "none"), description="normalizers to compare"
    )
    batch_sizes: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Entries, Field(min_length=1)
    ] = Field((2, 8), description="local batch sizes")
    partitions: Annotated[tuple[str, ...], Entries] = Field(
        (), description="such as dirichlet:alpha=0.3 or iid (empty: the experiment's own)"
    )
    seeds: int = Field(
        5, ge=1, le=LARGEST_SEED_COUNT, description="result cells of a group: seed, seed + 1, …"
    )
    learning_rates: Annotated[tuple[Positive, ...], Entries, Field(min_length=1)] = Field(
        (0.01, 0.03, 0.1, 0.3), description="searched on validation images (one: no search)"
    )
    search_seeds: int = Field(1, ge=1, le=100, description="seeds for each learning rate searched")
    search_rounds: int = Field(0, ge=0, description="rounds of a search cell (0: rounds)")
    axes: dict[str, tuple[Scalar, ...]] = Field(
        {}, description="further settings to vary, and the values of each"
    )
    weights_sha256: tuple[str, ...] = Field(
        (), description="SHA-256 of each file of an axis model.weights (a run fills it in)"
    )
    workers: int = Field(
        0, ge=0, description="cells that run at the same time at most (0: one per core or GPU)"
    )
