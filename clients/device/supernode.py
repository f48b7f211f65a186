"""``python -P -m clients.device.supernode``: ``flower-supernode`` with a SuperExec of ours.

It takes the same arguments, with a ``--port`` among them, and ``--certificate``: a PEM file with
the certificate that it shows the server's proxy, and its key. The only file here that reaches into
Flower's SuperNode, which knows no client certificates.
"""

# ruff: noqa: PLC0415 - Flower takes seconds to import, in which the SuperExec starts beside it

from __future__ import annotations

import argparse
import os
import secrets
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fedkn.files import write_atomically

if TYPE_CHECKING:
    from flwr.supernode.fleet_http_client import FleetHttpClient

__all__ = ["client_with", "main", "superexec_command"]

_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2; those of 1.3 are all as good."""


def main() -> None:
    """Start the SuperExec, then be ``flower-supernode``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--certificate", type=Path)
    own, rest = parser.parse_known_args()
    for variable, value in _PARTS.items():
        os.environ.setdefault(variable, value)
    # Elsewhere a fork of a process with torch loaded is not safe.
    if sys.platform == "linux":
        # Whoever knows it is given tasks: nobody but the SuperExec that is started here.
        secret = _home() / "superexec.secret"
        write_atomically(secret, secrets.token_bytes(32), mode=0o600)
        port = int(rest[rest.index("--port") + 1])
        subprocess.Popen(superexec_command(port, os.getpid(), secret))
        rest += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    from flwr.supernode import fleet_http_connection
    from flwr.supernode.cli import flower_supernode

    vars(fleet_http_connection)["FleetHttpClient"] = client_with(own.certificate)
    sys.argv = ["flower-supernode", *rest]
    flower_supernode()


def superexec_command(port: int, supernode: int, secret: Path | None = None) -> list[str]:
    """Return the command line of the SuperExec.

    Args:
        port: of the SuperNode's own API, on 127.0.0.1.
        supernode: its pid. The SuperExec ends with that process.
        secret: the file of what both know, where the SuperNode asks for it.
    """
    return [
        *(sys.executable, "-P", "-c", _SUPEREXEC, "--insecure"),
        *("--runtime-api-address", f"127.0.0.1:{port}", "--parent-pid", str(supernode)),
        *(("--superexec-auth-secret-file", str(secret)) if secret else ()),
    ]


def client_with(certificate: Path | None) -> type[FleetHttpClient]:
    """Return Flower's client of the Fleet API, but that it shows `certificate` if there is one."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    class Client(FleetHttpClient):
        @classmethod
        def from_server_address(
            cls,
            server_address: str,
            insecure: bool,
            root_certificates: bytes | str | None,
            interceptors: Any,
            **settings: Any,
        ) -> Self:
            if insecure or not isinstance(root_certificates, bytes):
                return super().from_server_address(
                    server_address, insecure, root_certificates, interceptors, **settings
                )
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(_CIPHERS)
            context.load_verify_locations(cadata=root_certificates.decode("ascii"))
            if certificate is not None:
                context.load_cert_chain(certificate)
            url = f"https://{server_address}"
            return cls(url, interceptors=interceptors, verify=context, **settings)

    return Client


def _home() -> Path:
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr"))


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
