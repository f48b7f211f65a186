"""Which GPUs there are, as users of CUDA_VISIBLE_DEVICES and MIG know them; when one is full."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import device_of
from fedkn.gpus import GpuFull, device_name, full_gpu, gpu_kind, gpu_state, visible_gpus


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Return a function that gives this machine GPUs, as CUDA would count them."""

    def put(count: int, visible: str | None) -> None:
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")

    return put


@pytest.mark.parametrize(
    ("count", "visible", "found"),
    [
        (0, None, []),
        (3, None, ["0", "1", "2"]),
        (2, "2,0", ["2", "0"]),
        (1, "GPU-8a2b", ["GPU-8a2b"]),
        (2, " 1 , 3 ", ["1", "3"]),
        (0, "", []),
        (0, "-1", []),
        # CUDA stops at what is no device.
        (1, "0,-1,1", ["0"]),
        (2, "0,1,9", ["0", "1"]),
        # A process sees one instance, but each process may have its own.
        (1, "MIG-1f,MIG-2e,MIG-1f", ["MIG-1f", "MIG-2e"]),
    ],
)
def test_the_gpus_are_those_that_cuda_visible_devices_names(machine, count, visible, found) -> None:
    machine(count, visible)
    assert visible_gpus() == found


def test_a_device_is_named_as_its_user_knows_it(machine) -> None:
    machine(2, "5,3")
    assert device_name(torch.device("cpu")) == "cpu"
    assert device_name(torch.device("cuda")) == "NVIDIA H100, GPU 5"
    assert device_name(torch.device("cuda:1")) == "NVIDIA H100, GPU 3"
    machine(1, "MIG-1f,MIG-2e")
    assert device_name(torch.device("cuda:0")) == "NVIDIA H100, GPU MIG-1f"


def test_the_kind_is_what_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_kind(torch.device("cpu")) == ""
    slices = SimpleNamespace(name="A100 MIG 1g.5gb", major=8, minor=0, multi_processor_count=14)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: slices)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 5))
    state = gpu_state(torch.device("cuda:0"))
    assert state.kind == "A100 MIG 1g.5gb, compute capability 8.0, 14 multiprocessors"
    assert (state.free, state.total) == (3, 5)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (GpuFull("the GPU's memory did not suffice"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
        (MemoryError(), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_a_full_gpu_is_told_from_other_failures(error: BaseException, full: bool) -> None:
    assert full_gpu(error) is full


def test_a_gpu_that_is_named_becomes_the_current_one(
    machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(3, None)
    current: list[int] = []
    started = [False]
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started[0])
    names = ("cpu", "cuda", "auto", "cuda:0", "cuda:2")
    for name in names:
        device_of(ExperimentConfig.resolve({"device": name}))
    assert current == [2], "the first is the current one by itself"
    started[0] = True
    for name in names:
        device_of(ExperimentConfig.resolve({"device": name}))
    assert current == [2, 0, 0, 0, 2]
    with pytest.raises(UserError, match="this machine has 3 CUDA devices"):
        device_of(ExperimentConfig.resolve({"device": "cuda:3"}))
