"""The fleet folder's README: the exact commands, with this fleet's names and paths."""

from __future__ import annotations

import shlex
from string import Template

from server.deployment.fleet import Fleet
from server.deployment.units import service_user

__all__ = ["instructions"]


def instructions(fleet: Fleet) -> str:
    """Return README.md."""
    first = fleet.devices[0]
    return _TEXT.substitute(
        clients=fleet.clients,
        address=fleet.address,
        host=fleet.host,
        port=fleet.port,
        superlink=fleet.superlink_address,
        path=shlex.quote(str(fleet.path)),
        device=first.name,
        last=fleet.devices[-1].name,
        user=service_user(),
        ca_key=fleet.authority_key.relative_to(fleet.path),
    )


_TEXT = Template(
    """\
# A fedkn fleet of $clients devices

Devices reach the server at `$address`. Everything of the fleet lies in this folder, which holds
secrets: keep it to yourself (mode 0700).

## All of it on this machine

    fedkn deploy up $path --local
    fedkn deploy run $path
    fedkn deploy status $path
    fedkn deploy logs $path --follow
    fedkn deploy down $path

## Server here, devices elsewhere

1. On the server, as `$host`: `apt-get install nginx`, open TCP port $port, then
   `fedkn deploy up $path`. Only nginx listens to other machines; the SuperLink is at $superlink.
2. Copy every device its own folder, over a channel you trust, and remove it here:

       scp -r $path/devices/$device device:/etc/fedkn/device

   and so on to `$last`. A device's private key needs to be nowhere else.
3. On the device: `pip install 'fedkn[device]'`, `fedkn device check /etc/fedkn/device`,
   `fedkn device start /etc/fedkn/device`.
4. On the server: `fedkn deploy status $path`, then `fedkn deploy run $path --config mine.toml`.

Keep `$ca_key` off the server: it is needed only to renew the server's certificate:
`fedkn deploy renew $path`. With the key here `fedkn deploy up` does so in its last 30 days.

## As services

They run as `$user`, which must own this folder and see the way to it:

    useradd --system $user; chown -R $user: $path   # unless that is you
    cp $path/systemd/*.service /etc/systemd/system/
    systemctl enable --now fedkn-superlink fedkn-superexec fedkn-proxy

After `fedkn deploy renew`: `systemctl restart fedkn-superlink fedkn-proxy`.
On a device: `fedkn-device.service` in its folder. `systemctl` and `fedkn deploy up` do not know of
each other: use one of them. Containers: `containers/` (not run where fedkn is developed).
"""
)
