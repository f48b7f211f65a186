"""What a conversion changed in a model, what it kept, and why."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Change", "Conversion", "Kept"]


@dataclass(frozen=True)
class Change:
    """A layer that was replaced: its path, what it was and what it is now.

    `note` says what went over to the new layer, or did not, beside what its kind says.
    """

    name: str
    before: str
    after: str
    note: str = ""


@dataclass(frozen=True)
class Kept:
    """A layer that was left as it is, and why."""

    name: str
    layer: str
    reason: str


@dataclass(frozen=True)
class Conversion:
    """What a conversion changed and what it did not; `str` gives one line for each.

    `traced` says whether neighbours were found in the data flow (torch.fx) or, where the model
    cannot be traced, by the order of its modules: then look at the lines.
    """

    changed: tuple[Change, ...]
    kept: tuple[Kept, ...]
    traced: bool

    def __str__(self) -> str:
        found = "data flow" if self.traced else "order of modules (the model cannot be traced)"
        lines = [f"{len(self.changed)} changed, {len(self.kept)} kept; read from the {found}"]
        notes = {c.name: f" ({c.note})" if c.note else "" for c in self.changed}
        lines += [f"changed {c.name}: {c.before} -> {c.after}{notes[c.name]}" for c in self.changed]
        lines += [f"kept {k.name}: {k.layer}: {k.reason}" for k in self.kept]
        return "\n".join(lines)
