"""``python -m tests.fuzz``: hostile replies and damaged files by the ten thousand, at random.

A case is a function of the seed, its target and its number: ``--only TARGET:NUMBER`` repeats one.
A case fails by any exception but those that its target is to raise; memory is limited by the
kernel. Cases run in slices, each in a process of its own, one after another; with ``--results`` a
campaign that was interrupted goes on. docs/threat-model.md has the figures of the last campaign.
"""

# ruff: noqa: T201 - this prints its figures

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import resource
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fuzz.targets import TARGETS

_MEMORY = 1 << 30
_SLICE = 5_000


@dataclass
class Slice:
    """What became of the cases `first` to `first + cases - 1` of a target.

    `grew` is how far the process' peak memory rose, in bytes; `outcomes` counts cases by what they
    returned; `failures` has the first case of each failure, by where it was raised.
    """

    target: str
    seed: int
    first: int
    cases: int
    failed: int = 0
    seconds: float = 0.0
    grew: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, int, int, int]:
        """What it was a run of."""
        return (self.target, self.seed, self.first, self.cases)

    def line(self) -> str:
        """Return it as a line of JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def read(line: str) -> Slice:
        """Return what `line` wrote."""
        return Slice(**json.loads(line))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--only", metavar="TARGET:NUMBER", help="one case, with its traceback")
    parser.add_argument(
        "--results", type=Path, metavar="FILE",
        help="where finished slices are kept: those in it are not run again (of this code: a new "
        "file after a change)",
    )  # fmt: skip
    parser.add_argument("--slice", metavar="TARGET:FIRST:CASES", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.only:
        name, _, number = given.only.partition(":")
        print(TARGETS[name].run(_generator(given.seed, name, int(number))))
        return 0
    if given.slice:
        name, first, cases = given.slice.split(":")
        print(run_slice(Slice(name, given.seed, int(first), int(cases))).line())
        return 0
    return campaign(given.target or list(TARGETS), given.cases, given.seed, given.results)


def campaign(names: Sequence[str], cases: int, seed: int, results: Path | None) -> int:
    """Run `cases` cases in all, print a line for each target, and return 1 if one failed."""
    known = {}
    if results and results.exists():
        lines = results.read_text(encoding="utf-8").splitlines()
        known = {part.place: part for part in map(Slice.read, lines)}
    print(f"seed {seed}; {'target':20} {'cases':>7} {'failed':>6} {'seconds':>8} {'ms':>6} peak")
    total = sum(TARGETS[name].share for name in names)
    sums = Counter[str]()
    for name in names:
        parts = []
        for part in _slices(name, seed, max(1, round(cases * TARGETS[name].share / total))):
            done = known.get(part.place)
            if done is None:
                done = _in_a_process(part)
                if results:
                    with results.open("a", encoding="utf-8") as file:
                        file.write(done.line() + "\n")
            parts.append(done)
        sums += Counter(_print_target(parts))
    print(f"{sums['cases']} cases, {sums['failed']} failures in {sums['seconds']:.0f} s")
    return 1 if sums["failed"] else 0


def run_slice(part: Slice) -> Slice:
    """Run the cases of `part` here, and return it with what became of them."""
    run = TARGETS[part.target].run
    with suppress(Exception):
        run(_generator(part.seed, part.target, -1))  # what is loaded once is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + _MEMORY, limits[1]))
    # Flower collects garbage after every aggregation: not all that was ever imported.
    gc.collect()
    gc.freeze()
    outcomes = Counter[str]()
    begun = time.monotonic()
    try:
        for case in range(part.first, part.first + part.cases):
            try:
                outcomes[run(_generator(part.seed, part.target, case))] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                part.failed += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                at = f"{type(error).__name__} in {where.filename.rpartition('/')[2]}:{where.lineno}"
                part.failures.setdefault(at, (case, ascii(str(error))[:160]))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    part.seconds, part.outcomes = time.monotonic() - begun, dict(outcomes)
    part.grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return part


def _slices(name: str, seed: int, cases: int) -> Iterator[Slice]:
    for first in range(0, cases, _SLICE):
        yield Slice(name, seed, first, min(_SLICE, cases - first))


def _in_a_process(part: Slice) -> Slice:
    """Run `part` in a process of its own; one that ends without an answer has failed."""
    where = f"{part.target}:{part.first}:{part.cases}"
    command = [sys.executable, "-m", "tests.fuzz", "--seed", str(part.seed), "--slice", where]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return Slice.read(done.stdout.splitlines()[-1])
    part.failed = part.cases
    part.failures["the process"] = (part.first, f"it ended with {done.returncode}")
    return part


def _print_target(parts: Sequence[Slice]) -> dict[str, float]:
    """Print what became of a target's cases, and return the sums."""
    name, seed = parts[0].target, parts[0].seed
    cases, failed = sum(part.cases for part in parts), sum(part.failed for part in parts)
    seconds = sum(part.seconds for part in parts)
    grew = max(part.grew for part in parts) / 2**20
    print(
        f"        {name:20} {cases:7} {failed:6} {seconds:8.1f} {1000 * seconds / cases:6.2f} "
        f"+{grew:.0f} MiB",
        flush=True,
    )
    outcomes = sum((Counter(part.outcomes) for part in parts), Counter[str]())
    shown = ", ".join(f"{kind} {count}" for kind, count in outcomes.most_common(12))
    print(f"          {shown}", flush=True)
    failures: dict[str, tuple[int, str]] = {}
    for part in parts:
        failures = part.failures | failures
    for at, (case, text) in failures.items():
        print(f"          FAILED {at}: {text}; --only {name}:{case} --seed {seed}", flush=True)
    return {"cases": cases, "failed": failed, "seconds": seconds}


def _generator(seed: int, name: str, case: int) -> random.Random:
    return random.Random(f"{seed}-{name}-{case}")


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - no folder is meant
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.exit(main())
