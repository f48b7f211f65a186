"""Who is alive: the SuperNodes' heartbeats, as the SuperLink keeps them.

A SuperNode sends one about every 20 s. The SuperLink takes a node for gone that has sent none for
60 s (two of the intervals that nodes promise), or that signed off.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

__all__ = ["Heartbeats", "heartbeat_age"]


class Heartbeats:
    """Knows the nodes that are online, and when each was last heard from.

    In a simulation every node that the grid names is alive whenever it is looked for.
    """

    def __init__(self, grid: Grid, clock: Callable[[], float] = time.monotonic) -> None:
        self._grid = grid
        self._clock = clock
        self._last: dict[int, float] = {}
        self._outage = False

    def online(self) -> set[int]:
        """Look who is online; return the ids of these nodes."""
        now = self._clock()
        if isinstance(self._grid, HttpGrid):
            ages = {node.node_id: heartbeat_age(node) for node in self._grid.get_nodes()}
        else:
            ages = dict.fromkeys(self._grid.get_node_ids(), 0.0)
        if ages and self._outage:
            # It was the SuperLink that was away: nobody's silence counts.
            self._last = dict.fromkeys(self._last, now)
        self._outage = not ages
        self._last |= {node: now - (age or 0.0) for node, age in ages.items()}
        return set(ages)

    def age(self, node: int) -> float | None:
        """Return how many seconds ago `node` was last heard from, None if it never was.

        As of the last look for nodes that are online.
        """
        last = self._last.get(node)
        return None if last is None else self._clock() - last


def heartbeat_age(node: NodeInfo) -> float | None:
    """Return how many seconds ago the SuperLink had a node's last heartbeat, None if never.

    For a node that signed off, since then: the SuperLink keeps no more of it. The SuperLink's clock
    is taken for ours: it runs on this machine.
    """
    if not node.HasField("online_until") or not node.online_until:
        return None
    patience = HEARTBEAT_PATIENCE * node.heartbeat_interval if node.status == "online" else 0.0
    return max(0.0, time.time() - (node.online_until - patience))
