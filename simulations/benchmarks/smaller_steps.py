"""Ways to a step that takes less memory: ``python -m simulations.benchmarks.smaller_steps``.

ResNet-8 of width 16 on 3x32x32 images, a local epoch of four steps of 8 images on one thread of the
CPU: whole, in local batches of 2 whose gradients are accumulated, and whole in bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from fedkn import models, normalizers
from fedkn.config import TrainConfig
from fedkn.training import Inputs, LocalTask, Workspace, train_locally
from fedkn.training.memory import peak_bytes
from simulations.benchmarks.timing import time_in_turn

__all__ = ["measure"]

_NORMALIZERS = ("none", "batch", "group", "ws_group", "kernel")
_STEPS, _IMAGES = 4, 8
_WAYS = {
    "whole": TrainConfig(batch_size=_IMAGES),
    "accumulated": TrainConfig(batch_size=2, accumulate=_IMAGES // 2),
    "bfloat16": TrainConfig(batch_size=_IMAGES, precision="bfloat16"),
}


def measure(name: str, repetitions: int) -> dict[str, tuple[float, float, float]]:
    """Return for every way ms a step, its time over that of the whole step, and its peak in MiB."""
    normalizer = normalizers.create(name)
    layout = normalizer.memory_format
    model = models.build("resnet8", num_classes=10, in_channels=3, normalizer=normalizer, width=16)
    model.to(memory_format=layout)  # type: ignore[call-overload]  # as torch has it
    workspace = Workspace(model)
    generator = torch.Generator().manual_seed(0)
    shape = (_STEPS * _IMAGES, 3, 32, 32)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, shape[:1], generator=generator)
    inputs = Inputs("unit", memory_format=layout)

    def way(train: TrainConfig) -> Callable[[], None]:
        task = LocalTask(0, 1, 0, train, 0.01)

        def run() -> None:
            train_locally(workspace, images, labels, task, inputs=inputs, normalizer=normalizer)

        return run

    runs = {key: way(train) for key, train in _WAYS.items()}
    times = time_in_turn(runs, repetitions=repetitions, device=workspace.device)
    return {
        key: (
            times[key].median / _STEPS * 1e3,
            times[key].ratio(times["whole"]),
            peak_bytes(run, workspace.device) / 2**20,
        )
        for key, run in runs.items()
    }


def _table() -> str:
    torch.set_num_threads(1)
    lines = [
        "| normalizer | whole, ms a step | peak MiB | accumulated | peak | bfloat16 | peak |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in _NORMALIZERS:
        found = measure(name, repetitions=9)
        figures = [f"{found['whole'][0]:.0f} | {found['whole'][2]:.1f}"]
        for way in ("accumulated", "bfloat16"):
            _, ratio, peak = found[way]
            figures.append(f"x{ratio:.2f} | {peak:.1f}")
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(_table())
