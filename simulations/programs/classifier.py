"""A trained classifier as a user meets it: pixels in, probabilities of named classes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Self

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.seeds import derive
from fedkn.text import printable
from fedkn.training import Inputs
from fedkn.training.draws import own_draws

__all__ = ["Card", "Classifier", "FromPixels"]

_BATCH = 64
_LONGEST_SIDE = 1 << 14


@dataclass(frozen=True)
class Card:
    """What a file needs to say of the classifier in it.

    Attributes:
        classes: names, in the order of the logits.
        channels, height, width: of the images that it takes.
        scaling: how pixels are scaled, inside the program: (pixels / 255 - mean) / deviation, with
            `mean` and `deviation` for each channel.
        run, cell, round: where it was trained, and after which round; weights_sha256: of the
            global tensors. model, normalizer: their names. fedkn: the version that wrote this.
    """

    classes: tuple[str, ...]
    channels: int
    height: int
    width: int
    scaling: str
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    run: str
    cell: str
    round: int
    weights_sha256: str
    model: str
    normalizer: str
    fedkn: str

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the card that `to_json` wrote. Raises ValueError if `text` is not one."""
        card = TypeAdapter(cls).validate_json(text, strict=True)
        if card.to_json() != json.dumps(json.loads(text)):
            raise ValueError("other fields than expected")
        sides = (card.channels, card.height, card.width)
        if not card.classes or not all(0 < side <= _LONGEST_SIDE for side in sides):
            raise ValueError("no classes, or no size that images have")
        return card

    def to_json(self) -> str:
        """Return the card as a JSON object."""
        return json.dumps(asdict(self))


class FromPixels(nn.Module):
    """A network with its pixel scaling in front: float32 (N, C, H, W) in [0, 255] to logits."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean.view(-1, 1, 1).clone())
        self.register_buffer("deviation", deviation.view(-1, 1, 1).clone())

    @classmethod
    def of(cls, network: nn.Module, inputs: Inputs, channels: int) -> Self:
        """Return `network` behind the scaling of `inputs`, to the bit, without augmentation."""
        if inputs.mean is not None and inputs.deviation is not None:
            return cls(network, inputs.mean, inputs.deviation)
        if inputs.scaling == "unit":
            return cls(network, torch.zeros(channels), torch.ones(channels))
        if inputs.scaling == "centered":
            return cls(network, torch.full((channels,), 0.5), torch.full((channels,), 0.5))
        raise UserError(f"pixel scaling '{inputs.scaling}' cannot be built into a program")

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (N, classes)."""
        scaled = (pixels / 255 - self.mean) / self.deviation
        logits: Tensor = self.network(scaled)
        return logits


@dataclass(frozen=True, eq=False)
class Classifier:
    """Something that turns float32 pixels in [0, 255] into logits, and its card."""

    card: Card
    run: Callable[[Tensor], Tensor]

    def logits(self, pixels: Tensor) -> Tensor:
        """Return float32 (N, classes) for uint8 `pixels` (N, C, H, W), on the CPU.

        Raises UserError if they are not finite: the model diverged in training; or if the model
        cannot be run.
        """
        try:
            # A network that draws in evaluation gives the same answer every time it is asked.
            with torch.no_grad(), own_draws(pixels.device, derive("prediction")):
                parts = [self.run(some.to(torch.float32)) for some in torch.split(pixels, _BATCH)]
            logits = torch.cat(parts)
        # A program that is damaged, or no classifier of such images, may raise anything.
        except Exception as error:
            raise UserError(
                f"the model of cell '{self.card.cell}' cannot be run on images of "
                f"{tuple(pixels.shape[1:])}: {printable(error)}"
            ) from error
        if logits.shape != (len(pixels), len(self.card.classes)):
            raise UserError(
                f"the model of cell '{self.card.cell}' gives {tuple(logits.shape)} for "
                f"{len(pixels)} images of {len(self.card.classes)} classes: it is not the model "
                "that its card describes"
            )
        if not torch.isfinite(logits).all():
            raise UserError(
                f"the outputs of cell '{self.card.cell}' are not finite: it diverged in training; "
                "use another cell or round"
            )
        return logits

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Return float64 (N, classes), each row of sum 1, for uint8 `pixels` (N, C, H, W)."""
        return torch.softmax(self.logits(pixels).double(), 1)
