"""The Triton kernels, in Triton's interpreter on the CPU; and that a compiler takes them.

Both need a process of their own: Triton reads TRITON_INTERPRET when a kernel is defined.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedkn.errors import UserError
from fedkn.layers import KNConv2d, dropout_stream, triton_switch
from fedkn.layers.kernel.backends import triton

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: it comes with PyTorch's CUDA builds",
)


def run(program: str, **environment: str) -> None:
    answer = subprocess.run(
        [sys.executable, HERE / program],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[4])} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


@needs_triton
def test_kernels_agree_with_the_plain_path_in_the_interpreter() -> None:
    run("triton_agrees.py", TRITON_INTERPRET="1")


@needs_triton
def test_clients_of_a_stack_get_their_own_in_as_few_launches_as_one_in_the_interpreter() -> None:
    run("triton_clients.py", TRITON_INTERPRET="1", FEDKN_NATIVE="0")


@needs_triton
def test_kernels_compile_for_a_device(tmp_path) -> None:
    run("triton_compiles.py", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_device_gives_what_the_cpu_gives(layout, offset) -> None:
    torch.manual_seed(0)
    layer = KNConv2d(16, 8, 3, padding=1)
    x = torch.randn(4, 16, 14, 14) + offset
    results = []
    for device in ("cpu", "cuda"):
        placed = layer.to(device)
        leaf = x.to(device, memory_format=layout).requires_grad_()
        with dropout_stream(1):
            y = placed(leaf)
        gradients = torch.autograd.grad(y.square().sum(), [leaf, *placed.parameters()])
        results.append([t.cpu() for t in (y, *gradients)])
    for host, device in zip(*results, strict=True):
        assert ((host - device).norm() / host.norm()).item() < (1e-5 if offset == 0 else 1e-3)


@pytest.fixture
def fresh(monkeypatch):
    triton.load.cache_clear()
    yield monkeypatch
    triton.load.cache_clear()


def test_outside_the_interpreter_the_kernels_reach_gpus_alone() -> None:
    assert not triton_switch.reaches(torch.device("cpu"))
    assert triton_switch.reaches(torch.device("cuda"))


def test_the_switch(fresh) -> None:
    fresh.setenv("FEDKN_TRITON", "0")
    assert not triton.load()
    triton.load.cache_clear()
    fresh.setenv("FEDKN_TRITON", "maybe")
    with pytest.raises(UserError, match="FEDKN_TRITON 'maybe'"):
        triton.load()
    triton.load.cache_clear()
    fresh.setenv("FEDKN_TRITON", "1")
    fresh.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install triton"):
        triton.load()
