"""What fills a page's template: numbers in their spelling, and text of outside made safe."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import fedkn
from fedkn.text import printable
from simulations.report import formats
from simulations.runs.statistics import FEWEST_SEEDS

__all__ = ["environment"]

_HERE = Path(__file__).parent
# More than any sentence of ours, and all of most commands.
_LONGEST = 10_000
# The functions of `formats` that are filters of the templates.
_FORMATS = (
    "count",
    "difference",
    "difference_unit",
    "epsilon",
    "half_width",
    "interval",
    "milliseconds",
    "p_value",
    "rounds",
    "size",
    "target",
    "value",
)


def environment(*folders: Path) -> Environment:
    """Return what renders the templates of the report, and of `folders` before them."""
    of = Environment(
        loader=FileSystemLoader([*folders, _HERE]),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    of.globals["css"] = Markup((_HERE / "report.css").read_text(encoding="utf-8"))
    of.globals["version"] = fedkn.__version__
    of.globals["fewest_seeds"] = FEWEST_SEEDS
    of.globals["keeps_tensors"] = f"{formats.KEEPS} {formats.KEEPS_TENSORS}"
    for name in _FORMATS:
        of.filters[name] = getattr(formats, name)
    of.filters["setting"] = _setting
    return of


def _visible(value: object) -> str:
    """Return what a template writes of `value`: text of outside has no characters of control."""
    text = value if isinstance(value, Markup) else str(value)
    return text if isinstance(text, Markup) or text.isprintable() else printable(text, _LONGEST)


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_setting(entry) for entry in value)
    return "–" if value is None or value == "" else str(value)
