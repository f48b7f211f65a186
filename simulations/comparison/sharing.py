"""Which cells run beside each other on which GPU, by the memory that their like were seen to take.

The first cell of a kind tells what its like need: two rounds after its start its process has seen
every kind of step and an evaluation. Whatever is decided here, a cell's numbers do not change; one
that finds its GPU full is run again from its checkpoint with a GPU for itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from fedkn.gpus import GpuState

__all__ = ["GpuSharing", "of_one_kind"]

_CUDA_ITSELF = 700 * 2**20
"""Bytes of context, kernels and libraries' workspaces, in every process."""

_MARGIN = 1.1
"""Of what was measured: fragments, and evaluations that were not seen."""

_UNKNOWN = 2.0
"""Times the most that any kind was seen to take, for a kind that was not seen."""


@dataclass
class _Running:
    kind: Hashable
    alone: bool
    seen: int = 0
    """The most bytes that its process has reserved so far."""
    settled: bool = False
    """Whether that is what it will need."""
    beside: int = 0
    """The most others that were on its GPU at once, since it began."""


@dataclass
class _Gpu:
    free: int
    running: dict[str, _Running] = field(default_factory=dict)


class GpuSharing:
    """Where cells run. Cells are known by their ids, GPUs by their places in `free`.

    Args:
        free: of every GPU the bytes that cells may take together.
    """

    def __init__(self, free: Mapping[int, int]) -> None:
        self._gpus = {place: _Gpu(bytes_) for place, bytes_ in free.items()}
        self._seen: dict[Hashable, int] = {}

    def place(self, kind: Hashable, *, alone: bool = False) -> int | None:
        """Return the GPU on which a cell of `kind` can begin now, None if it has to wait.

        A cell that is to be `alone` waits for an empty one, and so does the first of all.
        """
        open_ = sorted(self._gpus.items(), key=lambda of: (len(of[1].running), of[0]))
        for place, gpu in open_:
            if not gpu.running:
                return place
        if alone:
            return None
        need = self._need(kind)
        for place, gpu in open_:
            running = gpu.running.values()
            if need is None or any(cell.alone or not cell.settled for cell in running):
                continue
            if need + sum(self._share(cell) for cell in running) <= gpu.free:
                return place
        return None

    def least_busy(self) -> int:
        """Return the GPU that is empty soonest, as far as can be told: that with fewest cells."""
        return min(self._gpus, key=lambda place: (len(self._gpus[place].running), place))

    def without(self, place: int) -> GpuSharing:
        """Return this but for the GPU at `place`, which shall run empty."""
        rest = GpuSharing({})
        rest._gpus = {at: gpu for at, gpu in self._gpus.items() if at != place}
        rest._seen = self._seen
        return rest

    def begin(self, cell: str, kind: Hashable, place: int, *, alone: bool = False) -> None:
        """Note that `cell` has begun on the GPU at `place`."""
        running = self._gpus[place].running
        running[cell] = _Running(kind, alone, settled=kind in self._seen)
        for each in running.values():
            each.beside = max(each.beside, len(running) - 1)

    def reserved(self, cell: str, bytes_: int) -> None:
        """Note the most that the process of `cell` has reserved so far."""
        if (running := self._find(cell)) is None:
            return
        running.seen = max(running.seen, bytes_)
        if running.settled:
            self._learn(running)

    def settle(self, cell: str) -> None:
        """Note that `cell` has by now done all that it does."""
        running = self._find(cell)
        # Nothing was seen of a process that does not use the GPU, or too short a time.
        if running is not None and running.seen:
            running.settled = True
            self._learn(running)

    def end(self, cell: str) -> int:
        """Note that `cell` has ended or given up; return how many others ran beside it at most."""
        for gpu in self._gpus.values():
            if cell in gpu.running:
                return gpu.running.pop(cell).beside
        return 0

    def _find(self, cell: str) -> _Running | None:
        for gpu in self._gpus.values():
            if cell in gpu.running:
                return gpu.running[cell]
        return None

    def _learn(self, running: _Running) -> None:
        self._seen[running.kind] = max(self._seen.get(running.kind, 0), running.seen)

    def _need(self, kind: Hashable) -> float | None:
        """Return what a cell of `kind` is expected to take, None where nothing is known of any."""
        if not self._seen:
            return None
        known = self._seen.get(kind)
        return _bytes(_UNKNOWN * max(self._seen.values()) if known is None else known)

    def _share(self, cell: _Running) -> float:
        return _bytes(max(cell.seen, self._seen.get(cell.kind, 0)))


def of_one_kind(found: Mapping[int, GpuState | str]) -> tuple[dict[int, int], dict[int, str]]:
    """Return of the GPUs `found` the bytes free on those to be used, and why others are not.

    Used are those of the first one's kind: others compute other bits, and which cells a GPU gets is
    chance. What cannot be used at all is found as the reason.
    """
    states = {place: of for place, of in found.items() if isinstance(of, GpuState)}
    reasons = {place: of for place, of in found.items() if isinstance(of, str)}
    kind = next(iter(states.values())).kind if states else ""
    for place, state in states.items():
        if state.kind != kind:
            reasons[place] = f"it is another kind ({state.kind}) than the first ({kind})"
    return {place: of.free for place, of in states.items() if of.kind == kind}, reasons


def _bytes(reserved: float) -> float:
    return _MARGIN * reserved + _CUDA_ITSELF
