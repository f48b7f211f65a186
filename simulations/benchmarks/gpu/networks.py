"""A training step of a whole network, launched call by call and as one CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedkn import models, normalizers
from fedkn.layers import dropout_stream
from fedkn.training import FlatSGD
from fedkn.training.captured import Captured
from fedkn.training.precision import computing_in, training_scores

__all__ = ["NetworkCase", "NetworkTime", "measure_network", "network_cases"]


@dataclass(frozen=True)
class NetworkCase:
    """KNResNet-18's architecture with a normalizer, on batches of 3x32x32 images."""

    normalizer: str
    batch: int
    precision: str
    channels_last: bool = True


@dataclass(frozen=True)
class NetworkTime:
    """Milliseconds of a step, eager and replayed, and the most memory it had allocated."""

    case: NetworkCase
    eager: float
    replayed: float
    peak_mib: float


def network_cases(quick: bool) -> Iterator[NetworkCase]:
    """Yield the cases of the table, BatchNorm's in both layouts first of each kind."""
    for precision, batches in (("tf32", (2, 8, 32)), ("bfloat16", (2, 32)), ("float32", (2,))):
        for batch in batches if not quick else batches[:1]:
            for name in ("batch", "kernel") if quick else ("batch", "kernel", "group", "none"):
                yield NetworkCase(name, batch, precision)
            if not quick:
                for name in ("batch", "kernel"):
                    yield NetworkCase(name, batch, precision, channels_last=False)


def measure_network(case: NetworkCase, device: torch.device, *, seconds: float) -> NetworkTime:
    """Time a step of the network for about so many `seconds` in each way; medians count."""
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    model = models.build(
        "knresnet18",
        num_classes=10,
        in_channels=3,
        normalizer=normalizers.create(case.normalizer),
        final_norm="kernel",
    ).to(device)
    model.to(memory_format=layout)  # type: ignore[call-overload]  # as torch has it
    model.train()
    optimizer = FlatSGD(model)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, 3, 32, 32, generator=draw).to(device)
    x = x.contiguous(memory_format=layout)
    labels = torch.randint(10, (case.batch,), generator=draw).to(device)
    seed = torch.tensor(0, device=device)

    def step() -> None:
        optimizer.zero_grad()
        with dropout_stream(seed):
            loss = F.cross_entropy(training_scores(model, x, case.precision), labels)
        loss.backward()  # type: ignore[no-untyped-call]  # torch annotates it so
        optimizer.step(1e-3, momentum=0.9, weight_decay=0.0, clip_norm=0.0)

    with computing_in(case.precision, device):
        eager = _timed(step, seconds, device)
        if device.type != "cuda":
            return NetworkTime(case, eager, eager, 0.0)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        graph = Captured(step, (*optimizer.changed, *model.buffers()))
        replayed = _timed(graph.replay, seconds, device)
    return NetworkTime(case, eager, replayed, peak)


def _timed(step: Callable[[], None], seconds: float, device: torch.device) -> float:
    """Return the median milliseconds of a step, of runs of ten."""

    def run() -> float:
        started = time.perf_counter()
        for _ in range(10):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 100 * (time.perf_counter() - started)

    run()
    times, end = [run()], time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(run())
    return statistics.median(times)
