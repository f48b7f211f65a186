"""The CUDA devices of this process: which there are, what each is, and when one is full."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fedkn.errors import UserError

__all__ = [
    "GpuFull",
    "GpuState",
    "device_name",
    "full_gpu",
    "gpu_kind",
    "gpu_state",
    "make_current",
    "visible_gpus",
]


class GpuFull(UserError):
    """A GPU's memory did not suffice."""


@dataclass(frozen=True)
class GpuState:
    """A CUDA device as one process sees it: its kind, and of its memory what is free, in bytes."""

    kind: str
    free: int
    total: int


def visible_gpus() -> list[str]:
    """Return the GPUs that work can be spread over, as ``CUDA_VISIBLE_DEVICES`` names each of them.

    Without that variable these are the indices of all devices. With it they are its entries, as far
    as CUDA reads them: an index, the UUID of a GPU or of a MIG instance. A process sees one MIG
    instance at most, but each of several processes may have its own, so all of them count.
    """
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(count)]
    entries = [entry.strip() for entry in named.split(",")]
    if entries[0].startswith("MIG-"):
        return list(dict.fromkeys(entry for entry in entries if entry.startswith("MIG-")))
    # CUDA stops at the first entry that is no device.
    return entries[:count]


def device_name(device: torch.device) -> str:
    """Return what `device` is, for people: ``cpu``, or a GPU's model and which one it is."""
    if device.type != "cuda":
        return device.type
    index, gpus = _index(device), visible_gpus()
    which = gpus[index] if index < len(gpus) else str(index)
    return f"{torch.cuda.get_device_name(index)}, GPU {which}"


def gpu_kind(device: torch.device) -> str:
    """Return what two devices must have in common to compute the same bits; empty of a CPU."""
    if device.type != "cuda":
        return ""
    of = torch.cuda.get_device_properties(_index(device))
    return (
        f"{of.name}, compute capability {of.major}.{of.minor}, {of.multi_processor_count} "
        "multiprocessors"
    )


def gpu_state(device: torch.device) -> GpuState:
    """Return the state of the CUDA device `device`; this process takes memory there from now on."""
    free, total = torch.cuda.mem_get_info(_index(device))
    return GpuState(gpu_kind(device), free, total)


def make_current(index: int) -> None:
    """Let what names no device compute on the CUDA device `index`, in this thread."""
    # The first is that already, and looking at it would take memory there.
    if index or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.set_device(index)


def full_gpu(error: BaseException) -> bool:
    """Whether `error` says that a GPU's memory ran out: PyTorch's, or a library's beneath it."""
    if isinstance(error, torch.OutOfMemoryError | GpuFull):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


_SIGNS = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
