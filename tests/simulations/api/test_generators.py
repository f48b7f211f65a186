"""The random generators of whoever calls fedkn: as they were, from the first import on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import random
import numpy as np
import torch

random.seed(5), np.random.seed(5), torch.manual_seed(5)


def states():
    name, key, *rest = np.random.get_state()
    return random.getstate(), key.tolist(), rest, torch.get_rng_state().tolist()


before = states()


def check(what):
    moved = [one != other for one, other in zip(before, states())]
    assert not any(moved), (what, moved)


if __name__ == "__main__":
    import fedkn
    check("import fedkn")
    for name in fedkn.__all__:
        getattr(fedkn, name)
        check(name)
    result = fedkn.run(
        normalizer="none", model="seeding:net", rounds=1, clients=2, cohort=1,
        train={"local_steps": 1}, settings={"workers": 1}, progress=PROGRESS, out="run",
    )
    assert not result.failed
    check("run")
    fedkn.load("run").cells, result.rounds, result.report()
    check("results")
"""

_SEEDING = """
import random
import numpy as np
import torch
from torch import nn

random.seed(1), np.random.seed(1), torch.manual_seed(1)


def net(num_outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_outputs))
"""


@pytest.mark.parametrize("progress", [True, False])
def test_a_first_run_leaves_the_generators_as_they_were(progress: bool, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(_PROGRAM.replace("PROGRESS", str(progress)))
    (tmp_path / "seeding.py").write_text(_SEEDING)
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
