"""Accuracy and loss of a model on images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkn.seeds import derive
from fedkn.training.draws import own_draws
from fedkn.training.inputs import Inputs

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Fraction of right answers (0 to 1), mean cross entropy (nats) and number of examples."""

    accuracy: float
    loss: float
    examples: int


@torch.inference_mode()
def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, inputs: Inputs, batch_size: int
) -> Evaluation:
    """Evaluate `model`, in evaluation mode, on uint8 `images` (N, C, H, W) and int64 `labels` (N,).

    All three are on one device. The model is left in the mode in which it came. What a network
    draws in evaluation follows from the number of the batch: the same at every call.

    Raises:
        ValueError: if there are no images.
    """
    if not len(images):
        raise ValueError("cannot evaluate on no images")
    was_training = model.training
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    parts = torch.split(images, batch_size), torch.split(labels, batch_size)
    with own_draws(images.device, derive("evaluation")) as draws:
        for number, (some, answers) in enumerate(zip(*parts, strict=True)):
            with draws.seeded(derive("evaluation", number)):
                scores = model(inputs(some))
            right += (scores.argmax(1) == answers).sum()
            loss += F.cross_entropy(scores, answers, reduction="sum").double()
    model.train(was_training)
    return Evaluation(int(right) / len(images), float(loss) / len(images), len(images))
