"""Every test leaves the process's settings as it found them: the next is not to depend on it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from fedkn.layers import tf32


@pytest.fixture(autouse=True)
def _settings_are_left_as_they_were():
    before = _settings()
    yield
    after = _settings()
    changed = {name: (before.get(name), after.get(name)) for name in before | after}
    changed = {name: values for name, values in changed.items() if values[0] != values[1]}
    assert not changed, "the test has changed settings of the process and left them so"


# Libraries set some of their own where they are first used.
_VARIABLES = set(os.environ) - {"PYTEST_CURRENT_TEST"}
_OURS = {"FEDKN_TRITON", "FEDKN_NATIVE", "FLWR_HOME", "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"}


def _settings():
    own, cudnn = logging.getLogger("fedkn"), torch.backends.cudnn
    environment = {f"${name}": os.environ.get(name) for name in _VARIABLES | _OURS}
    return environment | {
        "folder": Path.cwd(),
        "logging": (logging.root.manager.disable, logging.root.level),
        "fedkn's log": (own.level, own.disabled, own.propagate, list(own.handlers)),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": tf32.switches(),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "mkldnn": torch.backends.mkldnn.enabled,
    }
