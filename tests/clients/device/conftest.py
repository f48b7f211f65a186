"""Images of devices: digits that were written to an .npz or to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedkn.config import ExperimentConfig
from fedkn.data import sources


@pytest.fixture
def digits_file(tmp_path: Path) -> Path:
    """Return an .npz with 200 digits, as a device would hold them."""
    train = sources.load("digits").train
    path = tmp_path / "own.npz"
    np.savez(path, images=train.inputs[:200].numpy(), labels=train.targets[:200].numpy())
    return path


def device_context(config: ExperimentConfig, **node_config: Any) -> Context:
    """Return the context of partition 1 of 3; in keywords ``_`` stands for a hyphen."""
    node = {"partition-id": 1, "num-partitions": 3}
    node |= {key.replace("_", "-"): value for key, value in node_config.items()}
    return Context(
        run_id=1, node_id=9, node_config=node, state=RecordDict(), run_config=config.flat()
    )
