"""``python -P -m clients.device.supernode``: ``flower-supernode`` with a SuperExec of ours.

It takes the same arguments, with a ``--port`` among them.
"""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["main", "superexec_command"]


def main() -> None:
    """Start the SuperExec, then put ``flower-supernode`` in place of this process."""
    arguments = ["flower-supernode", *sys.argv[1:]]
    for variable, value in _PARTS.items():
        os.environ.setdefault(variable, value)
    # Elsewhere a fork of a process with torch loaded is not safe.
    if sys.platform == "linux":
        port = int(arguments[arguments.index("--port") + 1])
        subprocess.Popen(superexec_command(port, os.getpid()))
        arguments += ["--isolation", "process"]
    os.execvp(arguments[0], arguments)


def superexec_command(port: int, supernode: int) -> list[str]:
    """Return the command line of the SuperExec.

    Args:
        port: of the SuperNode's own API, on 127.0.0.1.
        supernode: its pid. The SuperExec ends with that process.
    """
    return [
        *(sys.executable, "-P", "-c", _SUPEREXEC, "--insecure"),
        *("--runtime-api-address", f"127.0.0.1:{port}", "--parent-pid", str(supernode)),
    ]


# Not -m: every process that is forked would run the module again, as Python's fork server has it.
_SUPEREXEC = "from clients.device.superexec import main; main()"

# An update goes up in parts: one at a time here, of 256 KiB instead of 5 MiB. Flower waits 30 s for
# the answer to a part once the kernel has taken it, and a slow line must have sent it by then.
_PARTS = {
    "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(2**18),
    "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "1",
}


if __name__ == "__main__":
    main()
