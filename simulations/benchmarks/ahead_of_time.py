"""A whole local step compiled by AOTInductor, beside the recorded one.

``python -m simulations.benchmarks.ahead_of_time``: the network of the task `small`, batch 8, one
thread, in turn. It needs a C++ compiler and, on an idle machine, a minute.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._inductor
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from fedkn import models, normalizers
from fedkn.config import TrainConfig
from fedkn.layers.native import library
from fedkn.training import Inputs, LocalTask, Workspace, train_locally

_BATCH, _RATE, _TURNS = 8, 0.1, 500


def _main() -> None:
    torch.set_num_threads(1)
    normalizer = normalizers.create("group")
    model = models.build(
        "convnet3", num_classes=10, in_channels=3, normalizer=normalizer, width=8, seed=0
    )
    workspace = Workspace(model)
    images = torch.randint(256, (20 * _BATCH, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(10, (len(images),))
    inputs = Inputs("unit", memory_format=normalizer.memory_format)
    train = TrainConfig(batch_size=_BATCH, clip_norm=0.0)
    task = LocalTask(seed=1, round_=1, client=0, train=train, learning_rate=_RATE)
    train_locally(workspace, images, labels, task, inputs=inputs, normalizer=normalizer)
    assert workspace.host_recorder is not None
    (kinds,) = workspace.host_recorder._settings.values()
    (recorded,) = (kind.recorded for kind in kinds.values())
    assert recorded is not None
    optimizer = workspace.optimizer
    values, x, y = optimizer.values.clone(), inputs(images[:_BATCH]), labels[:_BATCH]

    def step(values: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        own = values.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(functional_call(model, optimizer.named(own), (x,)), y)
            (gradient,) = torch.autograd.grad(loss, own)
        return values - _RATE * gradient, loss.detach()

    begun = time.perf_counter()
    # Inductor sees through PyTorch's operations alone.
    with library.switched_off(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(make_fx(step)(values, x, y), (values, x, y))
        path = str(Path(folder) / "step.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        compiled = torch._inductor.aoti_load_package(path, run_single_threaded=True)
    print(f"compiled in {time.perf_counter() - begun:.0f} s of the clock")  # noqa: T201
    expected = step(values, x, y)
    got = compiled(values, x, y)
    error = max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True))
    print(f"values and loss differ from ours by {error:.1e}")  # noqa: T201
    taken: list[tuple[float, float]] = []
    for _ in range(_TURNS):
        one = time.thread_time()
        recorded._step.take(x, y, [_BATCH], [], [], _RATE)
        other = time.thread_time()
        compiled(values, x, y)
        taken.append((other - one, time.thread_time() - other))
    for name, column in zip(("recorded", "compiled"), zip(*taken, strict=True), strict=True):
        ordered = sorted(column)
        least, median = 1e3 * ordered[0], 1e3 * ordered[len(ordered) // 2]
        sys.stdout.write(f"{name}: median {median:.2f} ms a step, least {least:.2f}\n")


if __name__ == "__main__":
    _main()
