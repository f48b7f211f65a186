"""Engines against their rivals: whole runs, taken in turn, each in processes of its own."""

from __future__ import annotations

import json
import math
import os
import signal
import site
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.text import printable
from simulations.benchmarks.engine_tasks import TASKS, prepared
from simulations.benchmarks.results import machine
from simulations.whole_table import WholeTable

__all__ = [
    "CONTENDERS",
    "EngineFailure",
    "EngineResults",
    "EngineRow",
    "engines_json",
    "engines_table",
    "measure_engines",
]

CONTENDERS = ("auto", "inprocess", "batched", "ray", "loop-1", "loop-2", "pfl-1", "pfl-2")
"""Engines; the loop written by hand, and pfl-research, in one process and in two."""

_ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
}
_PFL = "pfl==0.6.0"
_LIMIT = 900.0


@dataclass(frozen=True)
class EngineRow:
    """One contender on one task.

    Attributes:
        seconds: of a round, the median over repetitions of each run's median.
        cpu_seconds: of a round, over all processes of the contender.
        first_round: seconds from the start of its process to the end of round 1.
        memory: of the server's process after the last round, bytes.
        ratio: median over the repetitions of its seconds over the first contender's; None where
            that has none.
    """

    task: str
    contender: str
    allocator: str
    seconds: float
    cpu_seconds: float
    first_round: float
    memory: float
    ratio: float | None


@dataclass(frozen=True)
class EngineFailure:
    """A contender that did not get through a task, and why; what it had done before counts."""

    task: str
    contender: str
    reason: str


@dataclass(frozen=True)
class EngineResults:
    """What was measured, and what could not be."""

    rows: Sequence[EngineRow]
    failed: Sequence[EngineFailure]


@dataclass(frozen=True)
class _Run:
    seconds: float
    cpu: float
    first: float
    memory: float


def measure_engines(
    tasks: Sequence[str],
    contenders: Sequence[str],
    *,
    repetitions: int,
    allocator_for_all: bool,
    workers: int,
    pfl_folder: Path | None,
    progress: Callable[[str], None],
    device: str = "cpu",
    seconds: float = math.inf,
    done: Callable[[EngineResults], None] = lambda _: None,
) -> EngineResults:
    """Measure `contenders` on `tasks`: A B C, B C A, C A B, …; ratios are to the first of them.

    Every task is measured once before any is measured again, and `done` is called after each run
    with what there is: whatever ends it early, little is lost. A contender that fails in a task is
    left out of the rest of it. It ends within about so many `seconds`.

    With `allocator_for_all` every contender gets the allocator setting that fedkn's engines give
    themselves. `pfl_folder` is where pfl-research's environment is, or is to be made. All compute
    on `device`, pfl on the CPU alone.

    Raises:
        UserError: pfl is asked for and there is no folder for it, or another device.
    """
    end = time.monotonic() + seconds
    python = sys.executable
    if device != "cpu" and any(name.startswith("pfl") for name in contenders):
        raise UserError("pfl-research is measured on the CPU: leave --device out, or pfl-N")
    if any(name.startswith("pfl") for name in contenders):
        if pfl_folder is None:
            raise UserError("pfl-research needs an environment of its own: give --pfl FOLDER")
        python = str(pfl_environment(pfl_folder))
    runs: dict[str, dict[str, list[_Run]]] = {t: {n: [] for n in contenders} for t in tasks}
    failed: dict[tuple[str, str], EngineFailure] = {}
    allocator = "all" if allocator_for_all else "as shipped"

    def results() -> EngineResults:
        rows = [row for task in tasks for row in _summary(task, runs[task], allocator)]
        return EngineResults(rows, list(failed.values()))

    with tempfile.TemporaryDirectory() as folder:
        prepared_tasks = []
        for task in tasks:
            config = prepared(TASKS[task], Path(folder)).overlay(workers=workers, device=device)
            path = Path(folder) / f"{task}.json"
            path.write_text(json.dumps(config.flat()), encoding="utf-8")
            prepared_tasks.append((task, config, path))
        for turn in range(repetitions):
            shift = turn % len(contenders)
            for task, config, path in prepared_tasks:
                for name in (*contenders[shift:], *contenders[:shift]):
                    if (task, name) in failed:
                        continue
                    progress(f"{task}: {name}, {turn + 1} of {repetitions}")
                    interpreter = python if name.startswith("pfl") else sys.executable
                    limit = min(_LIMIT, end - time.monotonic())
                    try:
                        run = _run(interpreter, name, path, config, allocator_for_all, limit)
                        runs[task][name].append(run)
                    except _ContenderFailedError as error:
                        failed[task, name] = EngineFailure(task, name, str(error))
                    done(results())
    return results()


def pfl_environment(folder: Path) -> Path:
    """Return the Python of the environment in `folder` that has pfl-research; make it if need be.

    It sees this environment's packages, so both use the same PyTorch; nothing is added to ours.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    found = subprocess.run([str(python), "-c", "import pfl"], check=False, capture_output=True)
    if found.returncode:
        (packages,) = (folder / "lib").glob("python*/site-packages")
        ours = [*site.getsitepackages(), *(p for p in sys.path if p)]
        (packages / "ours.pth").write_text("\n".join(ours) + "\n", encoding="utf-8")
        subprocess.run([str(python), "-m", "pip", "install", "-q", _PFL], check=True)
    return python


def engines_table(results: EngineResults) -> WholeTable:
    """Return the results as a table for a terminal."""
    view = WholeTable(title="Engines: seconds a round", title_justify="left")
    view.keys = 2
    for heading in ("task", "contender"):
        view.add_column(heading)
    for heading in ("round", "CPU", "ratio", "end of round 1", "memory"):
        view.add_column(heading, justify="right")
    for row in results.rows:
        view.add_row(
            row.task,
            row.contender,
            f"{row.seconds:.3f} s",
            f"{row.cpu_seconds:.3f} s",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            f"{row.first_round:.1f} s",
            f"{row.memory / 2**20:.0f} MiB",
        )
    caption = ["Medians of whole runs taken in turn; ratios to the first contender, by turn."]
    caption += [
        f"FAILED {of.task}: {of.contender}: {printable(of.reason)}" for of in results.failed
    ]
    view.caption = "\n".join(caption)
    return view


def engines_json(results: EngineResults, settings: Mapping[str, Any]) -> str:
    """Return results, settings and machine as JSON."""
    rows, failed = results.rows, results.failed
    tasks = dict.fromkeys([row.task for row in rows] + [failure.task for failure in failed])
    content = {
        "benchmark": "engines",
        "settings": dict(settings),
        "tasks": {name: TASKS[name].title for name in tasks},
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
        "failed": [asdict(failure) for failure in failed],
    }
    return json.dumps(content, indent=1)


def _summary(task: str, runs: Mapping[str, list[_Run]], allocator: str) -> list[EngineRow]:
    first = next(iter(runs.values()))
    return [
        EngineRow(
            task=task,
            contender=name,
            allocator=allocator,
            seconds=statistics.median(run.seconds for run in own),
            cpu_seconds=statistics.median(run.cpu for run in own),
            first_round=statistics.median(run.first for run in own),
            memory=statistics.median(run.memory for run in own),
            ratio=statistics.median(
                run.seconds / other.seconds for run, other in zip(own, first, strict=False)
            )
            if first
            else None,
        )
        for name, own in runs.items()
        if own
    ]


class _ContenderFailedError(Exception):
    """A run did not come to its end; the message says why, in one line."""


def _run(  # noqa: PLR0917 - what a run is
    python: str,
    contender: str,
    path: Path,
    config: ExperimentConfig,
    allocator: bool,
    limit: float,
) -> _Run:
    """Run a contender to its end and return its figures, the first half of the rounds left out.

    Raises:
        _ContenderFailedError: it failed, or took longer than `limit` seconds.
    """
    if limit <= 0:
        raise _ContenderFailedError("there was no time left for it")
    kind, _, number = contender.partition("-")
    ranks = int(number) if kind == "pfl" else 1
    name = kind if kind == "pfl" else contender
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(_ALLOCATOR if allocator else {})}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    started = time.monotonic()
    command = [python, "-m", "simulations.benchmarks.contender", name, str(path)]
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | (_rank(rank, ranks) if ranks > 1 else {}),
            process_group=0,
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=limit) for process in processes]
    except subprocess.TimeoutExpired:
        raise _ContenderFailedError(f"it did not end within {limit:.0f} s") from None
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    logs = [_lines(out) for out, _ in printed]
    if any(process.returncode for process in processes) or len(logs[0]) < config.rounds:
        complaint = (printed[0][1].strip().splitlines() or ["no rounds were run"])[-1]
        raise _ContenderFailedError(complaint)
    # Workers start, caches fill and memory settles in the first half.
    half = config.rounds // 2
    ends = [line["time"] for line in logs[0]]
    lengths = [end - begin for begin, end in zip(ends[half - 1 :], ends[half:], strict=False)]
    cpu = [sum(log[r]["cpu"] for log in logs) for r in range(config.rounds)]
    return _Run(
        seconds=statistics.median(lengths),
        cpu=(cpu[-1] - cpu[half - 1]) / (config.rounds - half),
        first=ends[0] - started,
        memory=logs[0][-1]["own_memory"],
    )


def _rank(rank: int, ranks: int) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "fedkn",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
    }


def _lines(text: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]
