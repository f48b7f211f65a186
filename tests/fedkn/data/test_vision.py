import os
import subprocess
import sys
from pathlib import Path

import pytest

# What torchvision's own __init__ does, where its compiled part did not load: it registers a
# function for an operator that nobody declared.
_BESIDE_A_CPU_TORCH = """
import torch
from torchvision import _meta_registrations
from torchvision import datasets
"""
_REGISTRATION = """
import torch
@torch.library.register_fake("torchvision::nms")
def meta_nms(dets, scores, iou_threshold):
    return dets.new_empty(0)
"""
_HEALTHY = """
import torch
_library = torch.library.Library("torchvision", "DEF")
_library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from torchvision import _meta_registrations
from torchvision import datasets
"""


def _run(code: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


def _package(folder: Path, init: str) -> Path:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(init)
    (folder / "torchvision" / "_meta_registrations.py").write_text(_REGISTRATION)
    (folder / "torchvision" / "datasets.py").write_text("ready = True\n")
    return folder


_IMPORT = """
from fedkn.data.vision import import_torchvision
first = import_torchvision()
assert import_torchvision() is first
print(first.__file__, first.datasets.ready)
"""


def test_the_double_fails_as_the_cuda_wheel_does(tmp_path: Path) -> None:
    run = _run("import torchvision", _package(tmp_path, _BESIDE_A_CPU_TORCH))
    assert "RuntimeError: operator torchvision::nms does not exist" in run.stderr


@pytest.mark.parametrize("init", [_BESIDE_A_CPU_TORCH, _HEALTHY], ids=["broken", "healthy"])
def test_import_succeeds_with_a_broken_and_with_a_healthy_build(init: str, tmp_path: Path) -> None:
    run = _run(_IMPORT, _package(tmp_path, init))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(tmp_path / "torchvision" / "__init__.py"), "True"]


def test_other_failures_are_not_hidden(tmp_path: Path) -> None:
    run = _run(_IMPORT, _package(tmp_path, "raise RuntimeError('operator foo::bar is missing')"))
    assert "RuntimeError: operator foo::bar is missing" in run.stderr


def test_the_installed_torchvision_works() -> None:
    code = """
from fedkn.data.vision import import_torchvision
torchvision = import_torchvision()
import torch
from torchvision.transforms import v2
assert torchvision.datasets.MNIST
assert torchvision.models.squeezenet1_1(num_classes=2)(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
print(v2.RandomHorizontalFlip(1.0)(torch.arange(3).view(1, 1, 3)).flatten().tolist())
"""
    run = _run(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[2, 1, 0]"


_SECOND_CALL = """
import random
import numpy as np
import torch
from fedkn.data.vision import with_torchvision
calls = []
def make():
    calls.append(torch.rand(()).item() + np.random.rand() + random.random())
    import torchvision
    return calls[-1], torchvision.datasets.ready
drawn = [with_torchvision(make), with_torchvision(make)]
assert all(ready for _, ready in drawn)
print(len(calls), drawn[0][0] == calls[0], drawn[1][0] == calls[0])
"""


@pytest.mark.parametrize(
    ("init", "expected"), [(_BESIDE_A_CPU_TORCH, "3 True False"), (_HEALTHY, "2 True False")]
)
def test_somebodys_code_draws_the_same_when_it_is_called_again(
    init: str, expected: str, tmp_path: Path
) -> None:
    run = _run(_SECOND_CALL, _package(tmp_path, init))
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == expected


_LAZY = """
import torch
from fedkn.tasks import Classification
def net(num_classes):
    import torchvision
    return torch.nn.Linear(2, num_classes)
def data():
    try:
        import torchvision
    except RuntimeError as error:
        raise ImportError("no torchvision") from error
    return torch.zeros(10, 2), torch.arange(10) % 2
class Task(Classification):
    def __init__(self):
        import torchvision
        super().__init__()
"""
_ASKED = {
    "model": """
from fedkn.config import ModelConfig
from fedkn.network import build_network
from fedkn.normalizers import create
model = ModelConfig(name="lazy:net")
build_network(model, create("none"), outputs=2, shape=(2,), seed=0)
""",
    "source": "from fedkn.data.sources import load; load('lazy:data')",
    "task": "from fedkn.tasks import create; create('lazy:Task')",
}


@pytest.mark.parametrize("kind", _ASKED)
def test_parts_of_ones_own_may_import_it_when_they_are_called(kind: str, tmp_path: Path) -> None:
    _package(tmp_path, _BESIDE_A_CPU_TORCH)
    (tmp_path / "lazy.py").write_text(_LAZY)
    run = _run(_ASKED[kind], tmp_path)
    assert run.returncode == 0, run.stderr
