"""What the programs of a fleet printed, line by line, also while they print."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from fedkn.errors import unknown_name
from server.deployment.fleet import Fleet
from server.deployment.programs import PROXY, SUPEREXEC, SUPERLINK
from server.deployment.proxy import REFUSALS

__all__ = ["follow_logs", "last_lines", "log_names"]

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_POLL_SECONDS = 0.3


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
        data = fleet.log(name).read_bytes()
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
    text = _COLOURS.sub("", data.decode("utf-8", errors="replace"))
    return [line.rstrip() for line in text.splitlines() if line.strip()]
