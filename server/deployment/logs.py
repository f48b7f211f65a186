"""What the programs of a fleet printed, line by line, also while they print."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from fedkn.errors import unknown_name
from fedkn.text import printable
from server.deployment.fleet import Fleet
from server.deployment.programs import PROXY, SUPEREXEC, SUPERLINK
from server.deployment.proxy import REFUSALS

__all__ = ["follow_logs", "last_lines", "log_names"]

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_POLL_SECONDS = 0.3
_LONGEST_LINE, _DEEPEST = 2000, 40
# Of a log of any size no more is read for its last lines.
_LAST_BYTES = 1 << 22


def log_names(fleet: Fleet, chosen: str = "") -> list[str]:
    """Return the programs whose logs there are, or the one that was `chosen`.

    Of what the proxy refuses there is a log as well.

    Raises UserError for a name that no program of the fleet has.
    """
    names = [SUPERLINK, SUPEREXEC, PROXY, REFUSALS, *(device.name for device in fleet.devices)]
    if chosen and chosen not in names:
        raise unknown_name("process", chosen, names)
    return [name for name in ([chosen] if chosen else names) if fleet.log(name).is_file()]


def last_lines(fleet: Fleet, name: str, count: int) -> list[str]:
    """Return the last `count` lines that a program printed, without colours and empty lines."""
    try:
        with fleet.log(name).open("rb") as file:
            file.seek(max(file.seek(0, 2) - _LAST_BYTES, 0))
            data = file.read()
    except OSError:
        return []
    return _lines(data)[-count:] if count else []


def follow_logs(fleet: Fleet, names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield ``(name, line)`` for every line printed from now on, without end."""
    offsets = {name: fleet.log(name).stat().st_size for name in names}
    while True:
        for name in names:
            try:
                with fleet.log(name).open("rb") as file:
                    # A program that was started again writes a new file.
                    if file.seek(0, 2) < offsets[name]:
                        offsets[name] = 0
                    file.seek(offsets[name])
                    data = file.read()
            except OSError:
                continue
            whole = data[: data.rfind(b"\n") + 1]
            offsets[name] += len(whole)
            yield from ((name, line) for line in _lines(whole))
        time.sleep(_POLL_SECONDS)


def _lines(data: bytes) -> list[str]:
    # Only a newline ends a line: what else Python takes for one may stand in what a device sent.
    text = _COLOURS.sub("", data.decode("utf-8", errors="replace"))
    return [_shown(line) for line in text.split("\n") if line.strip()]


def _shown(line: str) -> str:
    """Return `line` printable and of bounded length, indented as it was."""
    indent = len(line) - len(line.lstrip(" "))
    return " " * min(indent, _DEEPEST) + printable(line, _LONGEST_LINE)
