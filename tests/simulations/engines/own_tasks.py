"""Sources, networks and tasks such as a user has, for the tests of the engines beside this file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedkn.tasks import Metric, Task

N = 96


def _inputs(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(3))


def numbers() -> tuple[Tensor, Tensor]:
    """Vectors, and a number far from zero for each."""
    x = _inputs(6)
    return x, (x @ torch.arange(1.0, 7.0) / 6 + 20 + 0.1 * x[:, 0].square())


def several_numbers() -> tuple[Tensor, Tensor]:
    x = _inputs(6)
    return x, torch.stack([x[:, 0] - x[:, 1], x[:, 2].abs()], 1)


def labels() -> dict[str, object]:
    x = _inputs(6)
    return {
        "inputs": x,
        "targets": torch.stack([x[:, 0] > 0, x[:, 1] > 0.5, x.sum(1) > 0], 1).float(),
        "classes": ["left", "high", "sum"],
    }


def masks() -> dict[str, object]:
    """Images whose bright pixels are of class 1, and whose first column is of none."""
    x = _inputs(1, 8, 8)
    masks = (x[:, 0] > 0.3).long()
    masks[:, :, 0] = 255
    return {"inputs": x, "targets": masks, "classes": ["dark", "bright"]}


class Dense(nn.Module):
    """A small perceptron."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


class Pixels(nn.Module):
    """Scores for every pixel."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.last = nn.Conv2d(4, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Quantile(Task):
    """The pinball loss: a task that fedkn does not have, judged by a metric without bounds."""

    metrics = (Metric("pinball", higher_is_better=False), Metric("below", True, 0.0, 1.0, "%"))

    def __init__(self, level: float = 0.9) -> None:
        self.level = level

    def outputs(self, classes: int, shape: tuple[int, ...]) -> int:
        return 1

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        error = targets - outputs[:, 0]
        return torch.maximum(self.level * error, (self.level - 1) * error) - 1

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {
            "examples": torch.tensor(len(targets)),
            "loss": self.losses(outputs.double(), targets.double()).sum(),
            "below": (targets < outputs[:, 0]).sum(),
        }

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        n = int(sums["examples"])
        return {"pinball": float(sums["loss"]) / n, "below": int(sums["below"]) / n}


class Silent(Quantile):
    """Its loss has no gradient."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().losses(outputs.detach(), targets)


class Scalar(Quantile):
    """Its loss is one for all examples."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().losses(outputs, targets).mean()


class Mixing(Quantile):
    """An example's loss depends on the others'."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().losses(outputs - outputs.mean(0), targets)


class Undefined(Quantile):
    """Its loss is not finite."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().losses(outputs, targets) + math.nan


class Failing(Quantile):
    """Its loss fails."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.view(3, 1, 4)[0, 0]


class Means(Quantile):
    """Its sums are none."""

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {name: of / len(targets) for name, of in super().sums(outputs, targets).items()}


class Coarse(Quantile):
    """Its sums are of float32."""

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {name: of.float() for name, of in super().sums(outputs, targets).items()}


class Partial(Quantile):
    """It leaves a metric out."""

    def values(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"pinball": super().values(sums)["pinball"]}


class Overdone(Quantile):
    """A metric beyond its range."""

    metrics = (Metric("pinball", higher_is_better=False, lowest=1e6), *Quantile.metrics[1:])


class Other(Quantile):
    """Its mean loss is another one."""

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 2 * self.losses(outputs, targets).mean()


class Wide(Dense):
    """As many outputs as it likes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x)] * 2, 1)


class Pair(Dense):
    """Two outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), x  # type: ignore[return-value]


class Broken(Dense):
    """NaN from the beginning."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0 * 0


class Idle(Dense):
    """A layer that nobody asks."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.spare = nn.Linear(2, 2)


class Mixed(Dense):
    """One parameter is of another dtype."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.shift = nn.Parameter(torch.zeros(num_classes, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift.float()


class Deaf(Dense):
    """No parameter takes part."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach() + x.mean(1, keepdim=True).requires_grad_()


class Flat(nn.Module):
    """Scores for the image, not for its pixels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.flatten(1))
