"""What a training step computes in: float32, TF32 on a GPU, or bfloat16 by autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.layers import tf32

__all__ = ["check_precision", "computing_in", "training_scores"]


def training_scores(model: nn.Module, x: Tensor, precision: str) -> Tensor:
    """Return ``model(x)``, computed in `precision`.

    ``auto``, ``float32``, ``tf32``: in the model's own dtype. ``bfloat16``: convolutions and
    products of matrices in bfloat16, as PyTorch's autocast has it, and the scores as float32.
    Parameters, their gradients and running statistics keep their dtype.
    """
    if precision != "bfloat16":
        scores: Tensor = model(x)
        return scores
    with torch.autocast(x.device.type, torch.bfloat16):
        scores = model(x)
    return scores.float()


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Let a GPU compute float32 inside the block as `precision` has it, the same bits each time.

    By itself PyTorch takes TF32 for convolutions, with ten bits of mantissa, and cuDNN may choose
    algorithms whose sums depend on the order in which threads arrive. On the CPU without effect.
    """
    if device.type != "cuda":
        yield
        return
    before, deterministic = tf32.switches(), torch.backends.cudnn.deterministic
    tf32.take_tf32(precision in ("auto", "tf32"))
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        tf32.put_back(before)
        torch.backends.cudnn.deterministic = deterministic


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError if `device` cannot train in `precision`. A slow way is a way."""
    device = torch.device(device)
    reason = ""
    if precision == "tf32" and device.type != "cuda":
        reason = "only NVIDIA's GPUs have it"
    elif precision == "bfloat16":
        reason = _why_not(device)
    if reason:
        raise UserError(
            f"train.precision = '{precision}', which PyTorch cannot compute in on {device} here "
            f"({reason}): set train.precision = 'float32'"
        )


@lru_cache(maxsize=8)
def _why_not(device: torch.device) -> str:
    """Return what a small training step in bfloat16 fails of; empty if it works."""
    weight = torch.ones(2, 2, 3, 3, device=device, requires_grad=True)
    try:
        with torch.autocast(device.type, torch.bfloat16):
            out = F.conv2d(torch.ones(1, 2, 4, 4, device=device), weight)
        out.float().sum().backward()  # type: ignore[no-untyped-call]  # torch annotates it so
    except RuntimeError as error:
        return (str(error).strip().splitlines() or ["no reason given"])[0]
    return ""
