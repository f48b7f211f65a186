"""What the three ways to evaluate a kernel-normalized network cost in accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from fedkn.errors import UserError
from fedkn.experiment import data_summary, federated_data
from fedkn.layers import KernelNorm2d, KNConv2d, dropout_stream
from fedkn.layers.kernel.settings import Statistics
from fedkn.seeds import derive
from server.run_data import refuse_changes
from simulations.programs.trained_model import load_trained_model

__all__ = ["ModeAccuracy", "evaluation_modes"]

_BATCH = 256


@dataclass(frozen=True)
class ModeAccuracy:
    """Accuracies (0 to 1) on the test images: one, or one for each draw of the dropout."""

    mode: str
    accuracies: tuple[float, ...]


def evaluation_modes(folder: Path, cell: str | None, draws: int) -> list[ModeAccuracy]:
    """Evaluate the trained model of a run in every evaluation mode, "stochastic" `draws` times.

    Raises UserError where the run has no trained model, it has no kernel-normalized layer, or the
    data are not there or not those of the run.
    """
    trained = load_trained_model(folder, cell)
    layers = [m for m in trained.network.modules() if isinstance(m, KNConv2d | KernelNorm2d)]
    if not layers:
        raise UserError(f"the model of '{folder}' has no kernel-normalized layer: choose another")
    refuse_changes(trained.data, data_summary(trained.config), f"'{folder}'")
    test = federated_data(trained.config).test
    results = []
    for mode in get_args(Statistics):
        for layer in layers:
            layer.eval_mode = mode
        repeats = draws if mode == "stochastic" else 1
        accuracies = []
        for draw in range(repeats):
            right = 0
            with torch.inference_mode(), dropout_stream(derive("evaluation mode", draw)):
                for start in range(0, len(test), _BATCH):
                    some = slice(start, start + _BATCH)
                    answers = trained.network(test.inputs[some].float()).argmax(1)
                    right += int((answers == test.targets[some]).sum())
            accuracies.append(right / len(test))
        results.append(ModeAccuracy(mode, tuple(accuracies)))
    return results
