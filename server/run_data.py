"""The data that a run trains on, recorded in its folder: no later part of it trains on others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkn.config import DataConfig
from fedkn.data.summary import DataSummary
from fedkn.errors import UserError
from fedkn.files import write_atomically

__all__ = [
    "DataChanged",
    "Recorded",
    "hold_to_data",
    "move_data",
    "recorded_data",
    "refuse_changes",
]

_FILE = "data.json"
# What is done with a batch, and how files come to be here, chooses no image.
_NO_CHOICE = {"scaling", "flip", "crop_padding", "download"}


class DataChanged(UserError):
    """The data are not those that the run was begun with; the text says in what they differ."""


@dataclass(frozen=True)
class Recorded:
    """What data.json says of the images of one choice of ``data.*`` settings.

    Attributes:
        settings: the choice: `source`, `root` and what else selects images. summary: the images.
    """

    settings: dict[str, Any]
    summary: DataSummary

    def is_of(self, data: DataConfig, *, anywhere: bool = False) -> bool:
        """Whether `data` makes the same choice, in all settings that there were at the time.

        `anywhere`: in all but where the data lie.
        """
        chosen = _choice(data)
        if anywhere:
            chosen["root"] = self.settings.get("root", chosen["root"])
        return all(chosen.get(key) == value for key, value in self.settings.items())


def hold_to_data(folder: Path, data: DataConfig, now: DataSummary) -> bool:
    """Record in the run folder `folder` that it trains on the images `now`; refuse others later.

    Return False where the run was begun without a record, by an earlier fedkn: then there is
    nothing to compare with, and what is recorded now counts from now on.

    Raises:
        DataChanged: the images that `data` selects are not those recorded.
        UserError: data.json cannot be read. OSError: it cannot be written.
    """
    known = recorded_data(folder)
    for entry in known:
        if entry.is_of(data):
            refuse_changes(entry.summary, now, f"'{folder}'")
            return True
    log = folder / "metrics.jsonl"
    begun = not known and log.exists() and log.stat().st_size > 0
    entries = [(entry.settings, entry.summary) for entry in known] + [(_choice(data), now)]
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, entries)
    return not begun


def move_data(folder: Path, root: str, now: Sequence[tuple[DataConfig, DataSummary]]) -> None:
    """Let what the run folder `folder` recorded of its data hold for the same data in `root`.

    `now` is what is found there, by the settings that select it.

    Raises:
        DataChanged: they are not the same; nothing was written.
        UserError: data.json cannot be read. OSError: it cannot be written.
    """
    moved = [
        Recorded({**entry.settings, "root": root}, entry.summary) for entry in recorded_data(folder)
    ]
    for entry in moved:
        for data, summary in now:
            if entry.is_of(data):
                refuse_changes(entry.summary, summary, f"'{folder}'")
    if moved:
        _write(folder, [(entry.settings, entry.summary) for entry in moved])


def recorded_data(folder: Path) -> list[Recorded]:
    """Return what the run folder `folder` has recorded of its data, nothing where it has not.

    Raises:
        UserError: data.json cannot be read.
    """
    path = folder / _FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [
            Recorded(dict(entry["settings"]), DataSummary.from_record(entry))
            for entry in content["data"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"cannot read {path}, which says what data the run trains on: {error}; restore it, or "
            "begin a new run"
        ) from None


def refuse_changes(then: DataSummary, now: DataSummary, whose: str) -> None:
    """Raise `DataChanged` if the data are not `then`, those with which `whose` run was begun."""
    if found := then.changes(now):
        raise DataChanged(
            f"the data changed since {whose} was begun: {'; '.join(found)}. Put back the data that "
            f"it was begun with ({then.identity}; these are {now.identity}), or begin a new run in "
            "another folder"
        )


def _write(folder: Path, entries: Sequence[tuple[dict[str, Any], DataSummary]]) -> None:
    records = [{"settings": settings, **summary.to_record()} for settings, summary in entries]
    write_atomically(folder / _FILE, (json.dumps({"data": records}, indent=1) + "\n").encode())


def _choice(data: DataConfig) -> dict[str, Any]:
    """Return the settings of `data` that say which images are used, and for what."""
    return data.model_dump(exclude=_NO_CHOICE)
