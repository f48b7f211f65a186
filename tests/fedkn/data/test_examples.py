import numpy as np
import pytest
import torch

from fedkn.data.examples import Examples, Source
from fedkn.errors import UserError


def _data(count: int = 4, channels: int = 1, classes: tuple[str, ...] = ("a", "b")) -> Examples:
    images = torch.arange(count * channels * 6, dtype=torch.uint8).view(count, channels, 2, 3)
    return Examples(images, torch.arange(count) % len(classes), classes)


def test_select_keeps_order_and_repeats() -> None:
    data = _data()
    chosen = data.select(np.array([2, 0, 2]))
    assert chosen.targets.tolist() == [0, 0, 0]
    assert chosen.inputs.flatten(1)[:, 0].tolist() == [12, 0, 12]
    assert len(data.select(torch.tensor([], dtype=torch.int64))) == 0


def test_select_copies() -> None:
    data = _data()
    data.select(np.arange(4)).inputs.zero_()
    assert data.inputs[1].sum() > 0


def test_properties() -> None:
    source = Source("toy", _data(), _data(2))
    assert (source.num_classes, source.shape) == (2, (1, 2, 3))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), "got bool"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), r"N, C, H, W.*x\[:, None\]"),
        (torch.zeros(2, 3, 0), torch.zeros(2, dtype=torch.int64), "N, C, H, W"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int32), "int64 or float32"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(2), "2 classes, but targets"),
        (torch.zeros(2, 1, 2, 2), torch.zeros(2, 3), "2 classes, but targets"),
        (
            torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
            torch.zeros(3, dtype=torch.int64),
            "2 inputs but 3 targets",
        ),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 2]), r"0\.\.1"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, -1]), r"0\.\.1"),
    ],
)
def test_unfit_tensors_are_refused(
    images: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Examples(images, labels, ("a", "b"))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (_data(0), _data(), "no training examples"),
        (_data(), _data(0), "no test examples"),
        (_data(classes=("a",)), _data(classes=("a",)), "one class"),
        (_data(), _data(classes=("a", "c")), "classes differ"),
        (_data(), _data(channels=3), "inputs are uint8 1x2x3 but test inputs are uint8 3x2x3"),
    ],
)
def test_unfit_parts_are_refused(train: Examples, test: Examples, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Source("toy", train, test)
