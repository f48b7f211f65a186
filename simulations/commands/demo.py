"""``fedkn demo``: a real comparison in little more than a minute."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

from importlib.resources import as_file, files

from fedkn.tables import read_toml
from simulations.commands import options as o
from simulations.commands.options import given

__all__ = ["demo"]


def demo(
    *,
    workers: o.Workers = None,
    name: o.Name = None,
    out: o.Out = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Compare normalizers on the embedded digits: non-IID clients, batches of 2 and 8.

    Takes little more than a minute on two cores, needs no network, and writes a report.

    Example:

      fedkn demo
    """
    from simulations.commands import launch
    from simulations.comparison.grid import GridConfig

    with as_file(files("simulations") / "presets" / "demo.toml") as preset:
        table = read_toml(preset)
    flags = given(None, compare__workers=workers, compare__name=name)
    grid, run = launch.created(GridConfig.resolve(table, flags), "demo", out)
    launch.execute(grid, run, as_json=as_json)
