from __future__ import annotations

import pytest
import torch
from torch import nn

from fedkn.tasks import CLASSIFICATION
from fedkn.training import Inputs, evaluate


class Scores(nn.Module):
    """Scores that depend on the image alone, or, in training mode, on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.head = nn.Linear(16, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x).flatten(1))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (23, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return images, torch.randint(3, (23,), generator=generator)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_it_is_the_naive_loop(batch_size, data):
    images, labels = data
    model = Scores().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = evaluate(model, images, labels, Inputs("unit"), batch_size, goal=CLASSIFICATION)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval().double()
    right, loss = 0, 0.0
    for image, label in zip(images, labels, strict=True):
        scores = model(image[None].double() / 255)[0].detach()
        right += int(scores.argmax() == label)
        loss -= float(scores.log_softmax(0)[label])
    assert result.value == right / 23
    assert result.loss == pytest.approx(loss / 23, rel=1e-5)
    assert result.examples == 23


def test_a_model_in_evaluation_mode_stays_there(data):
    model = Scores().eval()
    evaluate(model, *data, Inputs("unit"), 8, goal=CLASSIFICATION)
    assert not model.training


def test_no_images(data):
    with pytest.raises(ValueError, match="no examples"):
        evaluate(Scores(), data[0][:0], data[1][:0], Inputs("unit"), 8, goal=CLASSIFICATION)
