"""Regression, several labels and a mask for each image, from the embedded digits.

    python examples/other_tasks.py regression

What the targets are decides which tasks fit; the task decides loss, metrics and what is better.
"""

import sys

import torch
from torch import Tensor, nn

import fedkn
from fedkn.data.sources import load


def ink_position() -> tuple[Tensor, Tensor]:
    """Return digits, and where the middle of each one's ink is: row and column, in pixels."""
    images = load("digits").train.inputs
    ink = images.reshape(len(images), 8, 8).float()
    places = torch.arange(8.0)
    row, column = (ink.sum(axis) @ places / ink.sum((1, 2)) for axis in (2, 1))
    return images, torch.stack([row, column], 1)


def properties() -> dict[str, object]:
    """Return digits, and what may hold of each: even, has a loop, five or more."""
    digits = load("digits").train
    number = digits.targets[:, None]
    hold = [number % 2 == 0, torch.isin(number, torch.tensor([0, 6, 8, 9])), number >= 5]
    return {
        "inputs": digits.inputs,
        "targets": torch.cat(hold, 1),
        "classes": ["even", "loop", "five or more"],
    }


def noisy_ink() -> dict[str, object]:
    """Return digits under noise, and for each pixel whether there was ink."""
    images = load("digits").train.inputs.reshape(-1, 1, 8, 8).float()
    noise = 60 * torch.randn(images.shape)  # fedkn seeds it
    return {
        "inputs": (images + noise).clamp(0, 255).to(torch.uint8),
        "targets": (images[:, 0] > 128).long(),
        "classes": ["paper", "ink"],
    }


def dense(num_outputs: int, in_channels: int, width: int = 8) -> nn.Module:
    """Return a network that gives scores of each pixel, (N, outputs, H, W)."""
    layers: list[nn.Module] = []
    for before in (in_channels, width):
        conv = nn.Conv2d(before, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, num_outputs, 1))


KINDS: dict[str, dict[str, object]] = {
    "regression": {"source": "other_tasks:ink_position", "model": {"name": "resnet8", "width": 4}},
    "multilabel": {"source": "other_tasks:properties", "model": {"name": "resnet8", "width": 4}},
    "segmentation": {"source": "other_tasks:noisy_ink", "model": "other_tasks:dense"},
}

if __name__ == "__main__":
    task = sys.argv[1] if len(sys.argv) > 1 else "regression"
    result = fedkn.compare(
        **KINDS[task],
        task=task,
        normalizer=["kernel", "group"],
        batch_size=4,
        seeds=1,
        learning_rate=[0.03, 0.1],
        partition="iid",
        clients=4,
        cohort=2,
        rounds=3,
        train={"local_steps": 15},
        name=task,
    )
    print(result.learning_rates[["normalizer", "learning_rate", "value", "chosen"]])
    print(result.cells[["cell", "learning_rate", "metric", "value"]].to_string(index=False))
