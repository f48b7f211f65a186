"""A training step of a whole network, launched call by call and as one CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedkn import models, normalizers
from fedkn.layers import dropout_stream
from fedkn.training import FlatSGD
from fedkn.training.precision import computing_in, training_scores
from simulations.benchmarks.gpu.device import Gpu

__all__ = ["NetworkCase", "NetworkTime", "measure_network", "network_cases"]


@dataclass(frozen=True)
class NetworkCase:
    """KNResNet-18's architecture with a normalizer, on batches of 3x32x32 images."""

    normalizer: str
    batch: int
    precision: str
    channels_last: bool = True
    width: int | None = None

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "contiguous"
        return f"{self.normalizer}, batch {self.batch}, {self.precision}, {layout}"


@dataclass(frozen=True)
class NetworkTime:
    """Milliseconds of a step, eager and replayed.

    `peak_mib`: the most memory that one eager step had allocated, model and gradients included.
    """

    case: NetworkCase
    eager: float
    replayed: float
    peak_mib: float


def network_cases() -> Iterator[NetworkCase]:
    """Yield the cases of the table, those with a goal first, BatchNorm before its rivals."""
    cases = [
        *(
            NetworkCase(name, batch, precision)
            for batch in (2, 32, 8)
            for precision in ("tf32", "bfloat16")
            for name in ("batch", "kernel")
        ),
        *(
            NetworkCase(name, batch, "tf32")
            for batch in (2, 32)
            for name in ("group", "none", "ws_group")
        ),
        *(
            NetworkCase(name, batch, "tf32", channels_last=False)
            for batch in (2, 32)
            for name in ("batch", "kernel")
        ),
        *(NetworkCase(name, 2, "float32") for name in ("batch", "kernel")),
        *(NetworkCase(name, 32, "bfloat16") for name in ("group", "none")),
    ]
    yield from cases


def measure_network(case: NetworkCase, device: Gpu, *, seconds: float = 0.3) -> NetworkTime:
    """Time a step of the network for about so many `seconds` in each way; medians count."""
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    before = device.held()
    model = models.build(
        "knresnet18",
        num_classes=10,
        in_channels=3,
        normalizer=normalizers.create(case.normalizer),
        final_norm="kernel",
        width=case.width,
    ).to(device.place)
    model.to(memory_format=layout)  # type: ignore[call-overload]  # as torch has it
    model.train()
    optimizer = FlatSGD(model)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, 3, 32, 32, generator=draw).to(device.place)
    x = x.contiguous(memory_format=layout)
    labels = torch.randint(10, (case.batch,), generator=draw).to(device.place)
    seed = torch.tensor(0, device=device.place)

    def step() -> None:
        optimizer.zero_grad()
        with dropout_stream(seed):
            loss = F.cross_entropy(training_scores(model, x, case.precision), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it so
        optimizer.step(1e-3, momentum=0.9, weight_decay=0.0, clip_norm=0.0)

    with computing_in(case.precision, device.place):
        step()
        device.wait()
        device.clear()
        step()
        peak = device.peak() - before
        eager = device.milliseconds(step, seconds=seconds)
        graph = device.capture(step, (*optimizer.changed, *model.buffers()))
        replayed = device.milliseconds(graph.replay, seconds=seconds)
    return NetworkTime(case, eager, replayed, peak)
