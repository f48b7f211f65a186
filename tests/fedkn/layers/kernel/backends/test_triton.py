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
from torch.utils._python_dispatch import TorchDispatchMode

from fedkn import models, normalizers
from fedkn.errors import UserError
from fedkn.layers import KNConv2d, dropout_stream, triton_switch
from fedkn.layers.kernel import dispatch, dropout
from fedkn.layers.kernel import layer as layer_module
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


class Operations(TorchDispatchMode):
    """Writes down PyTorch's operators that a device would launch something for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        if not function.is_view and "empty" not in str(function):
            self.names.append(str(function))
        return function(*arguments, **(settings or {}))


@needs_triton
def test_a_step_of_a_network_launches_little_more_than_batch_norms(monkeypatch) -> None:
    """With its dropout's seed on the device, as a loop or a graph of somebody's own has it."""
    launched = []
    monkeypatch.setattr(triton, "launch", lambda kernel, *_, **__: launched.append(kernel))
    monkeypatch.setattr(triton_switch, "reaches", lambda device: True)
    rows = tuple(row for row in dispatch.TABLE if row.name == "triton")
    monkeypatch.setattr(dispatch, "TABLE", rows)
    monkeypatch.setattr(dropout, "_stream_of", lambda device: 7)
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)

    def drawn(device, eager):  # as for maps on a device
        stream = dropout._active.stream
        return stream.key(device, eager)

    monkeypatch.setattr(layer_module, "draw_key", drawn)
    counts = {}
    for name in ("batch", "kernel"):
        built = {"num_classes": 10, "in_channels": 3, "final_norm": "none", "width": 4}
        model = models.build("knresnet18", normalizer=normalizers.create(name), **built).train()
        launched.clear()
        with Operations() as operations, dropout_stream(torch.tensor(0)):
            model(torch.randn(2, 3, 32, 32)).sum().backward()
        counts[name] = len(operations.names) + len(launched)
    layers = sum(isinstance(module, KNConv2d) for module in model.modules())
    assert len(launched) == 5 * layers
    assert counts["kernel"] < 1.3 * counts["batch"]


@needs_triton
def test_kernels_compile_for_a_device(tmp_path) -> None:
    run("triton_compiles.py", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.parametrize(
    ("samples", "clients", "taken"), [(65535, 1, True), (65536, 1, False), (512, 128, False)]
)
def test_no_more_samples_than_a_grid_has_rows(monkeypatch, samples, clients, taken) -> None:
    monkeypatch.setattr(triton_switch, "reaches", lambda device: True)
    monkeypatch.setattr(triton, "load", lambda: True)
    x, weight = torch.empty(samples, 1, 1, 1), torch.empty(1, 1, 1, 1)
    served = triton.takes(x, weight, clients)
    assert bool(served) == taken
    assert taken or "65535" in served


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
