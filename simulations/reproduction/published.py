"""A published table as data: what the paper ran, what it found, and how ours differs.

Each is a TOML file in tables/:

    title = "…"
    paper = "…"
    reading = "best"               # which round's figure the paper tells: best or last
    reading_note = "…"
    differences = ["…", "…"]       # of data and protocol, in sentences
    [protocol]                     # tables of docs/configuration.md
    rounds = 500
    [scale.small]                  # what differs from the protocol, and why
    note = "…"
    seeds = 3
    [scale.small.settings]
    rounds = 60
    [scale.paper]
    …
    [[rows]]
    name = "hbn"
    label = "HBN"
    published = 71.3               # in %; without one: reason = "…"
    [rows.settings]
    normalizer.name = "hbn"
    [rows.scale.small]             # where a row needs it: what the scale changes of the row
    train.learning_rate = 0.02
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedkn.errors import UserError, unknown_name
from fedkn.tables import read_toml
from fedkn.text import printable
from simulations.comparison.grid import GridConfig

__all__ = ["SCALES", "PublishedTable", "Row", "Scale", "names", "settings_of", "table"]

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=60)]
SCALES = ("small", "paper")
_FOLDER = Path(__file__).parent / "tables"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Part):
    """One row: its settings, and what the paper found.

    `published` is in per cent, `spread` what stands behind a "±" in the paper (of which kind, the
    table's `reading_note` says); without a figure `reason` says why there is none.
    """

    name: Name
    label: str
    published: Annotated[float, Field(ge=0, le=100)] | None = None
    spread: Annotated[float, Field(ge=0)] | None = None
    reason: str = ""
    settings: dict[str, Any] = {}
    scale: dict[Literal["small", "paper"], dict[str, Any]] = {}

    @model_validator(mode="after")
    def _a_figure_or_a_reason(self) -> Self:
        if (self.published is None) == (not self.reason):
            raise ValueError(f"row {self.name}: give published, or the reason that there is none")
        return self


class Scale(_Part):
    """How much of the protocol is run: settings over the protocol's, the number of seeds, why."""

    note: str
    seeds: int = Field(ge=1, le=1000)
    settings: dict[str, Any] = {}


class PublishedTable(_Part):
    """A published table; see the module for the file that holds it."""

    name: Name
    title: str
    paper: str
    reading: Literal["best", "last"]
    reading_note: str
    differences: tuple[str, ...]
    protocol: dict[str, Any]
    scale: dict[Literal["small", "paper"], Scale]
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if set(self.scale) != set(SCALES):
            raise ValueError(f"scale: give {' and '.join(SCALES)}")
        if len({row.name for row in self.rows}) != len(self.rows):
            raise ValueError("two rows have the same name")
        return self

    def part(self, scale: str) -> Scale:
        """Return what that scale changes. Raises UserError if there is no such scale."""
        for name, part in self.scale.items():
            if name == scale:
                return part
        raise unknown_name("scale", scale, SCALES)

    def row(self, name: str) -> Row:
        """Return the row of that name. Raises UserError, naming the nearest, if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise unknown_name(f"row of {self.name}", name, [row.name for row in self.rows])


def names(folder: Path = _FOLDER) -> list[str]:
    """Return the names of all tables."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def table(name: str, folder: Path = _FOLDER) -> PublishedTable:
    """Return the table of that name.

    Raises UserError if there is none, or its file does not say what a table must.
    """
    known = names(folder)
    if name not in known:
        raise unknown_name("published table", name, known)
    path = folder / f"{name}.toml"
    try:
        return PublishedTable.model_validate({"name": name, **read_toml(path)})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"'{path}': {place}: {printable(problem['msg'], 300)}") from None


def settings_of(
    of: PublishedTable, scale: str, row: Row, *, seeds: int, changes: dict[str, Any]
) -> dict[str, Any]:
    """Return the settings of a comparison that is one row: one group, `seeds` result cells.

    `changes` are of this machine, and come last: where the data are.

    Raises UserError for a setting that does not exist or has no such value.
    """
    layers = (
        of.protocol,
        of.part(scale).settings,
        row.settings,
        {
            key: value
            for name, own in row.scale.items()
            if name == scale
            for key, value in own.items()
        },
        changes,
    )
    one = GridConfig.single(*layers)
    return {
        key: value for key, value in one.experiment.flat().items() if key not in _SET_BY_RUNS
    } | {
        "compare.normalizers": [one.normalizer.name],
        "compare.batch_sizes": [one.train.batch_size],
        "compare.learning_rates": [one.train.learning_rate],
        "compare.seeds": seeds,
    }


_SET_BY_RUNS = {"checkpoint.folder", "checkpoint.cell", "evaluation.split"}
