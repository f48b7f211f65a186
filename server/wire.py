"""What a round asks of its clients, and how it gets to them: in messages, or directly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

from fedkn.data.summary import DataSummary
from fedkn.direct import Trained
from fedkn.federation import (
    ARRAYS,
    CONFIG,
    CONTROL,
    DATA,
    arrays_record,
    data_record,
    packed,
)
from fedkn.npy_headers import arrays_bytes

__all__ = ["DirectGrid", "Order", "sent_through"]

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Order:
    """What a round asks of its clients.

    Attributes:
        tensors: the global ones. control: what the strategy sends beside them; often nothing.
        parameters: the names of tensors that are parameters.
        data: what clients are told of the experiment's images.
        told: what all of them are told. own: by partition, what each of them is told besides.
        nodes: by partition, its node.
    """

    tensors: Arrays
    control: Arrays
    parameters: Collection[str]
    data: DataSummary
    told: Mapping[str, Any]
    own: Mapping[int, Mapping[str, Any]]
    nodes: Mapping[int, int]

    @cached_property
    def bytes_up(self) -> int:
        """The bytes of the arrays in an answer, with their .npy headers."""
        return arrays_bytes(self.tensors)

    @cached_property
    def bytes_down(self) -> int:
        """The bytes of the arrays that one client is sent."""
        return self.bytes_up + arrays_bytes(self.control)

    def messages(self, grid: Grid) -> dict[int, Message]:
        """Return the order as messages to be sent through `grid`, by partition."""
        content: dict[str, ArrayRecord | ConfigRecord] = {
            ARRAYS: sent_through(grid, self.tensors),
            DATA: data_record(self.data),
        }
        if self.control:
            content[CONTROL] = sent_through(grid, self.control)
        return {
            partition: Message(
                RecordDict({**content, CONFIG: ConfigRecord({**self.told, **self.own[partition]})}),
                dst_node_id=node,
                message_type=MessageType.TRAIN,
            )
            for partition, node in self.nodes.items()
        }


class DirectGrid(Grid):
    """A grid whose clients train on this machine: what is asked of them needs no messages."""

    @abstractmethod
    def train(self, order: Order, timeout: float | None) -> Mapping[int, Trained | str]:
        """Return by partition what the clients made of `order`, or what their error says.

        Args:
            timeout: seconds to wait for clients that can be interrupted; None: until they are done.
        """


def sent_through(grid: Grid, arrays: Arrays) -> ArrayRecord:
    """Return `arrays` as a record to be sent through `grid`: packed, if to deployed nodes."""
    record = arrays_record(arrays)
    return packed(record) if isinstance(grid, HttpGrid) and record else record
