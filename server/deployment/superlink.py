"""``python -P -m server.deployment.superlink``: ``flower-superlink`` that bears a hostile device.

It takes the same arguments. The only file here that reaches into Flower's SuperLink: a body is read
only of whom it may come from, nobody stores without bound, and what is over leaves the disk.
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from pathlib import Path

import uvicorn
from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from flwr.superlink.servicer.fleet import fleet_handlers
from starlette.middleware import Middleware

from server.deployment.admission import Admission
from server.deployment.disk import make_shrinkable, prune
from server.deployment.quota import Quota

__all__ = ["main"]

_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2; those of 1.3 are all as good."""

_PRUNE_SECONDS = 60.0


def main() -> None:
    """Be ``flower-superlink``, with a ``--database`` among the arguments."""
    database = Path(sys.argv[sys.argv.index("--database") + 1])
    make_shrinkable(database)
    vars(extensions)["get_middleware"] = lambda: (Middleware(Admission),)
    Quota().install(fleet_handlers)
    vars(uvicorn)["run"] = partial(uvicorn.run, ssl_ciphers=_CIPHERS)
    threading.Thread(target=_prune, args=(database,), daemon=True).start()
    sys.argv[0] = "flower-superlink"
    flower_superlink()


def _prune(database: Path) -> None:
    wait = threading.Event()
    while True:
        prune(database)
        wait.wait(_PRUNE_SECONDS)


if __name__ == "__main__":
    main()
