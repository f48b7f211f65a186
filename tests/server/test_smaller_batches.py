"""Whole runs whose clients accumulate gradients: the runs of larger batches."""

from __future__ import annotations

import numpy as np
import pytest

from tests.server.fake_grid import run, small

SETTINGS = {
    "partition__scheme": "quantity",  # so that clients take unlike numbers of steps
    "data__train_limit": 240,
    "train__local_steps": 0,
    "train__learning_rate": 0.01,
}


@pytest.mark.parametrize("strategy", ["fedprox", "scaffold", "fednova"])
def test_a_run_is_that_of_larger_batches(strategy):
    """Where server and clients counted local batches, SCAFFOLD and FedNova would go elsewhere."""
    config = small(strategy__name=strategy, train__momentum=0.5, **SETTINGS)
    large = run(config.overlay(train__batch_size=12)).tensors
    divided = run(config.overlay(train__batch_size=3, train__accumulate=4)).tensors
    steps = run(config.overlay(train__batch_size=3)).tensors
    for name, value in large.items():
        np.testing.assert_allclose(divided[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    assert any(np.abs(steps[n] - v).max() > 1e-2 for n, v in large.items())


def test_batchnorm_averages_running_statistics_of_its_small_batches():
    config = small(normalizer__name="batch", train__local_steps=2, train__learning_rate=1e-6)
    large, divided = (
        run(config.overlay(train__batch_size=b, train__accumulate=k)).tensors
        for b, k in ((8, 1), (2, 4))
    )
    name = next(n for n in large if n.endswith("running_mean"))
    # Momentum 0.1 in 2 steps of one batch, or of four, in each of 2 rounds.
    assert np.linalg.norm(divided[name]) > 1.5 * np.linalg.norm(large[name])
