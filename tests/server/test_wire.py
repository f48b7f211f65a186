"""Tensors are packed for deployed nodes, and for nobody else."""

from __future__ import annotations

from unittest.mock import create_autospec

import numpy as np
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

from fedkn.federation import arrays_to_tensors, is_packed
from server.wire import sent_through

ARRAYS = {"a": np.ones(3, np.float32), "b": np.zeros((), np.int64)}


def test_to_deployed_nodes_as_one_array():
    deployed = create_autospec(HttpGrid, instance=True)
    record = sent_through(deployed, ARRAYS)
    assert is_packed(record)
    assert {name: value.tolist() for name, value in arrays_to_tensors(record).items()} == {
        "a": [1.0, 1.0, 1.0],
        "b": 0,
    }
    assert not sent_through(deployed, {})


def test_to_others_one_by_one():
    assert list(sent_through(create_autospec(Grid, instance=True), ARRAYS)) == ["a", "b"]
