"""Compare normalizers in a network of your own: an ordinary PyTorch module, written with BatchNorm.

It takes no normalizer, so fedkn converts it for each one of the comparison; the report shows what
was changed and how many parameters were trained.
"""

from torch import Tensor, nn

import fedkn


class Net(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, num_classes: int, channels: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(2 * channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 1, H, W)."""
        return self.classifier(self.features(x).flatten(1))


if __name__ == "__main__":
    result = fedkn.compare(
        # From another file it could be the class itself: model=Net.
        model={"name": "own_model:Net", "options": {"channels": 4}},
        normalizer=["kernel", "group"],
        batch_size=2,
        seeds=1,
        learning_rate=0.1,
        rounds=2,
        clients=4,
        cohort=2,
        train={"local_steps": 4},
    )
    print(result.cells[["cell", "parameters", "value"]].to_string(index=False))
    for cell in result.cells.cell:
        print(result.model(cell))
