"""Reading metrics.jsonl while it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedkn.tasks.metric import Metric
from simulations.runs.metrics_lines import parsed

__all__ = ["MetricsTail"]


class MetricsTail:
    """Reads what was appended to metrics.jsonl since the last `poll`.

    A last line without its newline is left for the next poll; a malformed line is counted in
    `skipped` and passed over.

    Args:
        from_last: begin with the last line of one of these kinds (none: with the first line).
    """

    def __init__(self, path: Path, *, from_last: tuple[str, ...] = ()) -> None:
        self.path = path
        self.skipped = 0
        self._offset = 0
        self._from_last = from_last
        self._judged_by: dict[str, Metric] = {}

    def poll(self) -> list[dict[str, Any]]:
        """Return the complete lines appended since the last call, oldest first."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = [parsed(text, self._judged_by) for text in whole.split(b"\n") if text.strip()]
        self.skipped += lines.count(None)
        known = [line for line in lines if line is not None]
        first = max(
            (i for i, line in enumerate(known) if line["kind"] in self._from_last), default=0
        )
        self._from_last = ()
        return known[first:]
