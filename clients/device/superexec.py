"""A device's SuperExec: Flower's own, but for ClientApps, which it forks instead of starting.

Flower starts Python anew for every message, and importing torch is most of what that process does.
A forked one has everything at hand but the app, which comes with the server's bundle as ever.
`main` takes the arguments of ``flower-superexec``. The only file here that reaches into Flower's
SuperExec.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import psutil
from flwr.supercore.cli import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec as flower
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor
from flwr.supernode.runtime.run_clientapp import run_clientapp

__all__ = ["ForkingExecutor", "forget_own_packages", "main"]

# What a ClientApp imports, fedkn itself left out: that is the bundle's.
_PRELOADED = ("torch", "pydantic", "clients.device.superexec")
_OWN = ("fedkn", "clients", "server", "simulations")
# A kernel's name for a process has 15 letters at most.
_PROCESS_NAME = "flwr-clientapp"


class ForkingExecutor(SubprocessExecutor):
    """Starts ClientApps as children of a process that has torch loaded; other tasks as Flower does.

    That process is a fork server of Python's, single-threaded, and ends with this one.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOADED))
        forkserver.ensure_running()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process that `spec` describes."""
        if spec.task_type is not TaskType.CLIENT_APP or spec.runtime_dependency_install:
            return super().launch(spec)
        try:
            self._context.Process(target=_run, args=(spec,), daemon=True).start()
        except (OSError, EOFError) as error:
            # Without memory the fork server ends; the next launch starts another.
            return LaunchResult.failed(f"cannot fork a ClientApp: {error or 'out of memory?'}")
        return LaunchResult.accepted()


def forget_own_packages() -> None:
    """Let the next import of fedkn and its apps take what is first on the path: the bundle's."""
    for name in list(sys.modules):
        if name.partition(".")[0] in _OWN:
            del sys.modules[name]


def main() -> None:
    """Be ``flower-superexec``, with the executor above, once the SuperNode holds its port."""
    arguments = sys.argv[1:]
    address = arguments[arguments.index("--runtime-api-address") + 1]
    supernode = int(arguments[arguments.index("--parent-pid") + 1])
    _wait_for(supernode, int(address.rpartition(":")[2]))
    executor = ForkingExecutor()
    # Flower knows its own two executors alone.
    vars(flower)["get_executor"] = lambda *_, **__: executor
    flower_superexec()


def _wait_for(supernode: int, port: int) -> None:
    """Wait until a process of this user listens on `port`; end with the process `supernode`.

    Until then anybody on this machine may hold the port, and would be asked what to run.
    """
    own = str(os.getuid())
    while not any(
        (line[1], line[3], line[7]) == (f"0100007F:{port:04X}", _LISTENS, own)
        for line in map(str.split, Path("/proc/net/tcp").read_text().splitlines())
    ):
        if not psutil.pid_exists(supernode):
            sys.exit(1)
        time.sleep(0.1)


# How the kernel writes the state of a socket that listens.
_LISTENS = "0A"


def _run(spec: ExecutionSpec) -> None:
    with suppress(OSError):
        Path("/proc/self/comm").write_text(_PROCESS_NAME, encoding="ascii")
    forget_own_packages()
    certificates = spec.root_certificates_path
    run_clientapp(
        runtime_api_address=spec.runtime_api_address,
        token=spec.token,
        insecure=spec.insecure,
        certificates=Path(certificates).read_bytes() if certificates else None,
        parent_pid=spec.parent_pid,
    )
