"""``fedkn demo``: a real comparison in about a minute."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

from datetime import datetime
from importlib.resources import as_file, files

from fedkn.tables import read_toml
from simulations.commands import options as o

__all__ = ["demo"]


def demo(
    *,
    workers: o.Workers = None,
    name: o.Name = None,
    out: o.Out = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Compare normalizers on the embedded digits: non-IID clients, batches of 2.

    Takes about a minute on two cores, needs no network, and writes a report.

    Example:

      fedkn demo
    """
    from simulations.api import running
    from simulations.commands.launch import carry_out, repeat_command

    with as_file(files("simulations") / "presets" / "demo.toml") as preset:
        table = read_toml(preset)
    carry_out(
        lambda: running.compare(
            table,
            workers=workers,
            name=name or f"demo-{datetime.now():%Y%m%d-%H%M%S}",
            out=out,
            progress=not as_json,
            command=repeat_command(),
        ),
        as_json=as_json,
    )
