"""The task that docs/tasks.md shows is one, and trains a network as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import mean_pinball_loss

from fedkn.config import ExperimentConfig
from fedkn.experiment import federated_data
from fedkn.reference import federated_averaging
from simulations.engines.run import run_experiment
from tests.simulations.engines import own_tasks

PAGE = Path(__file__).parents[3] / "docs" / "tasks.md"


def test_the_task_of_the_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mytasks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = ExperimentConfig.resolve(
        {
            "rounds": 2,
            "cohort": 2,
            "workers": 1,
            "device": "cpu",
            "data.source": f"{own_tasks.__name__}:numbers",
            "data.scaling": "none",
            "partition.scheme": "iid",
            "partition.clients": 4,
            "model.name": f"{own_tasks.__name__}:Dense",
            "model.final_norm": "none",
            "normalizer.name": "none",
            "task.name": "mytasks:Quantile",
            "task.options.level": "0.8",
        }
    )
    outcome = run_experiment(config)
    for name, value in federated_averaging(config).items():
        assert np.array_equal(outcome.arrays[name].numpy(), value)
    targets = federated_data(config).test.targets.numpy()
    never_seen = mean_pinball_loss(targets, np.zeros_like(targets), alpha=0.8)
    assert 0 < outcome.value < never_seen
