"""What a device has done before what: streams, and who has waited for whom.

Every stream, and the host, knows how far each stream had come when it last waited for it. A tensor
that one stream writes while another may still read or write it is a race, which a device would
show as a wrong number once in a while.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Order", "Stream"]


class Stream:
    """A queue of a device."""

    count = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        del args, kwargs
        self.number = Stream.count
        Stream.count += 1
        self.seen: dict[int, int] = {}
        self.tick = 0
        self.given_back: list[tuple[int, int, str]] = []

    @property
    def cuda_stream(self) -> int:
        """What a kernel is launched on."""
        return self.number

    def wait_stream(self, other: Stream) -> None:
        """Begin what comes next when `other` has done what it has been given."""
        _join(self.seen, other.seen)


@dataclass
class _Use:
    """Who used a piece of memory: the last write, and the reads since, by stream."""

    made_on: Stream
    write: tuple[int, int, str] | None = None
    reads: dict[int, tuple[int, str]] = field(default_factory=dict)


class Order:
    """Notes who reads and writes which memory, in the order in which the host asks for it.

    Attributes:
        races: what no waiting keeps apart, in words.
        host: what the host has waited for. asked: what it has given to each stream.
    """

    def __init__(self) -> None:
        self.races: dict[str, int] = {}
        self.host: dict[int, int] = {}
        self.asked: dict[int, int] = {}
        self._uses: dict[int, _Use] = {}

    def wait_for(self, stream: Stream) -> None:
        """Let the host wait until `stream` has done what it has been given."""
        _join(self.host, stream.seen)

    def wait_for_all(self) -> None:
        """Let the host wait for all streams."""
        self.host.update(self.asked)

    def note(self, stream: Stream, reads: Iterable[int], writes: Iterable[int], what: str) -> None:
        """`stream` is given something to do with memory of these ids."""
        _join(stream.seen, self.host)
        stream.tick += 1
        stream.seen[stream.number] = self.asked[stream.number] = stream.tick
        for earlier in stream.given_back:
            # What it makes now may lie there.
            self._check(stream, earlier, "memory used anew")
        stream.given_back.clear()
        for place in reads:
            use = self._uses.get(place)
            if use is not None:
                self._check(stream, use.write, what)
                use.reads[stream.number] = (stream.tick, what)
        for place in writes:
            use = self._uses.setdefault(place, _Use(stream))
            self._check(stream, use.write, what)
            for number, (tick, by) in use.reads.items():
                self._check(stream, (number, tick, by), what)
            use.write, use.reads = (stream.number, stream.tick, what), {}

    def freed(self, place: int) -> None:
        """Nobody holds that memory any more: its first stream's next tensor may lie there."""
        use = self._uses.pop(place, None)
        if use is None:
            return
        found = [(number, tick, by) for number, (tick, by) in use.reads.items()]
        if use.write is not None:
            found.append(use.write)
        use.made_on.given_back += [one for one in found if one[0] != use.made_on.number]

    def gone(self, place: int) -> None:
        """Nobody holds that memory any more, and nobody else gets it."""
        self._uses.pop(place, None)

    def _check(self, stream: Stream, earlier: tuple[int, int, str] | None, what: str) -> None:
        if earlier is None or earlier[0] == stream.number:
            return
        number, tick, by = earlier
        if max(stream.seen.get(number, 0), self.host.get(number, 0)) < tick:
            frames = [
                f"{f.filename.rpartition('/')[2]}:{f.lineno}"
                for f in traceback.extract_stack()
                if "pretended_gpu" not in f.filename and "/torch/" not in f.filename
            ]
            # Which of the many streams says nothing.
            race = f"{what} after {by}, {' < '.join(frames[:-6:-1])}"
            self.races[race] = self.races.get(race, 0) + 1


def _join(into: dict[int, int], other: dict[int, int]) -> None:
    for number, tick in other.items():
        if tick > into.get(number, 0):
            into[number] = tick
