"""A worker: a process that runs one cell after another, so that its imports are paid for once.

`Worker` is the parent's side; ``python -m simulations.comparison.worker`` is the process itself.
The two talk in JSON lines: a cell's configuration goes in by standard input, what there is to tell
comes back by a pipe of its own, because standard output belongs to whatever the cell prints (it
goes to the run's log). The process ends by itself when its standard input closes, that is, when its
parent dies by whatever cause. One on a GPU tells what that is before its first cell, and while a
cell runs how much memory it has reserved there.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError
from fedkn.locks import HELD
from simulations.terminal import name_cell

__all__ = ["Worker", "WorkerDiedError"]

_GRACE = 3.0


class Worker:
    """A worker process as its parent sees it. Can be registered with a selector: `fileno`."""

    def __init__(
        self,
        runner: str,
        log: Path,
        *,
        held: tuple[Path, int | None] | None = None,
        gpu: str = "",
        device: str = "",
    ) -> None:
        """Start the process.

        Args:
            runner: ``module:function`` that runs a cell, given its ExperimentConfig.
            log: file to which everything is appended that the cells print.
            held: a folder that the process may write, and the descriptor of its lock, which the
                process keeps as long as it lives.
            gpu: the only CUDA device that the process sees (empty: all that this one sees).
            device: the CUDA device whose memory it tells of (empty: none).
        """
        self._results, child = os.pipe()
        folder, lock = held or (None, None)
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        "-P",
                        "-m",
                        "simulations.comparison.worker",
                        runner,
                        str(child),
                        device,
                    ],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=_environment(gpu, folder),
                    pass_fds=(child,) if lock is None else (child, lock),
                    # Ctrl-C reaches the whole process group of a terminal: leave it to the parent.
                    process_group=0,
                )
        finally:
            os.close(child)
        os.set_blocking(self._results, False)
        self._received = b""

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def fileno(self) -> int:
        """Return the descriptor that is readable when a cell has ended or the process died."""
        return self._results

    def submit(self, config: ExperimentConfig) -> None:
        """Give the worker a cell; one at a time."""
        assert self._process.stdin is not None
        # A broken pipe: it died, and `outcome` says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(config.flat()).encode() + b"\n")
            self._process.stdin.flush()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield what the process has told since the last call.

        ``error`` (one line or "") says that the cell has ended, with ``full`` whether it found its
        GPU's memory full; ``gpu`` is its GPU's state (`GpuState`) or why there is none;
        ``reserved`` the most bytes there that the cell has taken.

        Raises:
            WorkerDiedError: the process is gone, and how.
        """
        alive = True
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._results, 65536):
                self._received += data
            alive = False
        *lines, self._received = self._received.split(b"\n")
        yield from (dict(json.loads(line)) for line in lines)
        if not alive:
            raise WorkerDiedError(_cause(self._process.wait()))

    def stop(self) -> None:
        """End the process now, whatever it is doing, and wait until it is gone."""
        self._process.terminate()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        os.close(self._results)


class WorkerDiedError(Exception):
    """A worker process ended on its own, in the middle of a cell."""


def _environment(gpu: str, held: Path | None) -> dict[str, str]:
    return {
        **os.environ,
        # The parent's import path, so that both run the same code.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        # Small models are fastest on one thread, and the same bits come out on every machine size.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # glibc would give activations back to the kernel after every step and fault them in again:
        # up to half of the time of small-batch training.
        "MALLOC_TRIM_THRESHOLD_": "1000000000",
        "MALLOC_MMAP_THRESHOLD_": "1000000000",
        # The log is UTF-8 whatever the terminal is, and no character may end a cell.
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
        **({HELD: str(held.resolve())} if held else {}),
    }


def _cause(code: int) -> str:
    if code >= 0:
        return f"its process exited with code {code}"
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"


def _main(runner: str, results: int, device: str) -> None:
    os.set_inheritable(results, False)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests,), daemon=True).start()
    run = _resolved(runner)
    memory: DeviceMemory | None = None
    if device:
        from simulations.comparison.device_memory import (  # noqa: PLC0415 - needs PyTorch
            DeviceMemory,
            state_of,
        )

        _tell(results, gpu=state_of(device))
        memory = DeviceMemory(device, lambda bytes_: _tell(results, reserved=bytes_))
    while True:
        config = ExperimentConfig.resolve(json.loads(requests.get()))
        with memory.watched(max(1, config.workers)) if memory else contextlib.nullcontext():
            error, full = _run(run, config)
        sys.stdout.flush()
        _tell(results, error=error, full=full)


def _tell(results: int, **message: Any) -> None:
    # In one piece: several threads write.
    os.write(results, json.dumps(message).encode() + b"\n")


def _receive(requests: queue.SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        requests.put(line)
    # The parent is gone. Not sys.exit: the cell in flight would go on.
    os._exit(1)


def _resolved(runner: str) -> Callable[[ExperimentConfig], object]:
    module, _, function = runner.partition(":")
    found: Callable[[ExperimentConfig], object] = getattr(importlib.import_module(module), function)
    return found


def _run(run: Callable[[ExperimentConfig], object], config: ExperimentConfig) -> tuple[str, bool]:
    """Run a cell; return its error in one line, empty where there was none, and whether it is that
    a GPU was full.
    """
    name_cell(config.checkpoint.cell)
    try:
        run(config)
    except FedknError as error:
        return " ".join(str(error).split()) or type(error).__name__, _full(error)
    except Exception as error:
        sys.stderr.write(f"cell {config.checkpoint.cell}:\n{traceback.format_exc()}")
        sys.stderr.flush()
        return " ".join(f"{type(error).__name__}: {error}".split()), _full(error)
    return "", False


def _full(error: Exception) -> bool:
    if "torch" not in sys.modules:  # then it did not come from there
        return False
    from fedkn.gpus import full_gpu  # noqa: PLC0415 - needs PyTorch

    return full_gpu(error)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
