"""A real run folder, trained for two rounds, for tests of what is done with a trained model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fedkn.config import ExperimentConfig
from fedkn.experiment import build_model, federated_data, inputs_of
from fedkn.seeds import numpy_generator
from simulations import cli

__all__ = [
    "CLASSES",
    "EXPORTS",
    "HEIGHT",
    "WIDTH",
    "cell_folder",
    "config_of",
    "expected_logits",
    "fedkn",
    "held_out",
    "make_images",
    "make_run",
]

EXPORTS = Version(torch.__version__) >= Version("2.7")
"""Whether this PyTorch writes these networks as ONNX, and reads its own programs without fedkn."""

CLASSES = ("cat", "dog", "owl")
# Not square, so that a mix-up of the two shows.
HEIGHT, WIDTH = 12, 20


def fedkn(*arguments: str | Path) -> int:
    """Run the command line in this process; return its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def make_images(folder: Path) -> Path:
    """Make an image folder in which each class has a colour of its own."""
    generator = numpy_generator("trained runs")
    for split, number in (("train", 12), ("test", 6)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 130, (HEIGHT, WIDTH, 3), dtype=np.uint8)
                pixels[..., label] += 90
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def make_run(folder: Path, images: Path, *options: str) -> Path:
    """Train two short rounds on `images` into the run folder `folder`."""
    tiny = ["--rounds", "2", "--clients", "2", "--cohort", "2", "--set", "partition.minimum=4"]
    tiny += ["--set", "train.local_steps=4", "--model", "convnet3", "--set", "model.width=4"]
    source = ["--source", "image_folder", "--root", str(images)]
    assert fedkn("run", *tiny, *source, "--out", folder, *options) == 0
    return folder


def cell_folder(run: Path) -> Path:
    """Return the folder of the run's one cell."""
    (folder,) = (run / "cells").iterdir()
    return folder


def config_of(run: Path) -> ExperimentConfig:
    """Return the configuration of the run's one cell."""
    return ExperimentConfig.resolve(json.loads((cell_folder(run) / "config.json").read_text()))


def expected_logits(run: Path, pixels: Tensor, round_: int = 2) -> Tensor:
    """Return the logits of uint8 `pixels`, from the checkpoint's file and the training's inputs."""
    config = config_of(run)
    network = build_model(config)
    tensors = load_file(cell_folder(run) / f"checkpoint-{round_:06d}.safetensors")
    state = {name.removeprefix("model/"): value for name, value in tensors.items()}
    network.load_state_dict({k: v for k, v in state.items() if "/" not in k}, strict=False)
    with torch.no_grad():
        logits: Tensor = network.eval()(inputs_of(config, torch.device("cpu"))(pixels))
    return logits


def held_out(run: Path) -> tuple[Tensor, Tensor]:
    """Return the test images, uint8, and their labels."""
    test = federated_data(config_of(run)).test
    return test.inputs, test.targets
