"""``python -m tests.fuzz``: hostile replies and damaged files by the ten thousand, at random.

A case is a function of the seed, its target and its number: ``--only TARGET:NUMBER`` repeats one.
A case fails by any exception but those that its target is to raise; memory is limited by the
kernel. docs/threat-model.md has the figures of the last campaign.
"""

# ruff: noqa: T201 - this prints its figures

from __future__ import annotations

import argparse
import gc
import logging
import random
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from tests.fuzz.targets import TARGETS, Target

_MEMORY = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--only", metavar="TARGET:NUMBER", help="one case, with its traceback")
    given = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    if given.only:
        name, _, number = given.only.partition(":")
        print(TARGETS[name].run(_generator(given.seed, name, int(number))))
        return 0
    chosen = {name: TARGETS[name] for name in given.target or TARGETS}
    print(
        f"seed {given.seed}; {'target':20} {'cases':>7} {'failed':>6} {'seconds':>8} {'ms':>6} peak"
    )
    failed = 0
    total = sum(target.share for target in chosen.values())
    begun = time.monotonic()
    for name, target in chosen.items():
        cases = max(1, round(given.cases * target.share / total))
        failed += campaign(name, target, cases, given.seed)
    print(f"{failed} failures in {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


def campaign(name: str, target: Target, cases: int, seed: int) -> int:
    """Run `cases` cases of a target, print its line, and return how many failed."""
    with suppress(Exception):
        target.run(_generator(seed, name, -1))  # what is loaded once is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + _MEMORY, limits[1]))
    outcomes: Counter[str] = Counter()
    failures: dict[str, tuple[int, str]] = {}
    failed = 0
    # Flower collects garbage after every aggregation: not all that was ever imported.
    gc.collect()
    gc.freeze()
    begun = time.monotonic()
    try:
        for case in range(cases):
            try:
                outcomes[target.run(_generator(seed, name, case))] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                at = f"{type(error).__name__} in {where.filename.rpartition('/')[2]}:{where.lineno}"
                failures.setdefault(at, (case, ascii(str(error))[:160]))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    seconds = time.monotonic() - begun
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"        {name:20} {cases:7} {failed:6} {seconds:8.1f} {1000 * seconds / cases:6.2f} "
        f"+{peak:.0f} MiB",
        flush=True,
    )
    shown = ", ".join(f"{kind} {count}" for kind, count in outcomes.most_common(12))
    print(f"          {shown}", flush=True)
    for at, (case, text) in failures.items():
        print(f"          FAILED {at}: {text}; --only {name}:{case} --seed {seed}", flush=True)
    return failed


def _generator(seed: int, name: str, case: int) -> random.Random:
    return random.Random(f"{seed}-{name}-{case}")


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - no folder is meant
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
