"""How far one example moves what a private step sums: by its clipped gradient, and no further.

Epsilon is computed from that bound. It is measured here, without noise and with all examples in
every batch, on data sets of which one lacks one example of the other: the first, so that every
other example changes its place.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedkn import models, normalizers
from fedkn.config import PrivacyConfig, TrainConfig
from fedkn.errors import UserError
from fedkn.training import Inputs, LocalTask, Workspace, train_privately
from fedkn.training.example_draws import example_names

CLIP = 0.1
SIZE = 9
NO_NOISE = PrivacyConfig(mechanism="example", noise_multiplier=0.0, clip_norm=CLIP, secret=True)
AUGMENTED = Inputs("unit", flip=True, crop_padding=1)


def private_normalizers() -> list[str]:
    return [name for name in normalizers.names() if not list(build(name).buffers())]


def build(name: str) -> nn.Module:
    """Dropout where the architecture or the normalizer has it by default, a final KernelNorm."""
    normalizer = normalizers.create(name)
    model = models.build(
        "resnet8",
        num_classes=10,
        in_channels=1,
        normalizer=normalizer,
        width=4,
        seed=0,
        final_norm="kernel",
    )
    return model.to(memory_format=normalizer.memory_format)


def data(size: int = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def clipped_sum(workspace, keep, name="group", *, given=None, inputs=AUGMENTED, **settings):
    """Return the sum of a step's clipped gradients on the examples `keep`."""
    images, labels = given or data()
    train = TrainConfig(batch_size=-(-len(images) // settings.get("accumulate", 1)), **settings)
    workspace.load()
    before = workspace.optimizer.values.clone()
    train_privately(
        workspace,
        images[keep],
        labels[keep],
        LocalTask(3, 1, 0, train, 1.0, largest_batch=2),
        inputs=inputs,
        normalizer=normalizers.create(name),
        privacy=NO_NOISE,
    )
    expected = min(train.batch_size * train.accumulate, len(keep))
    return (before - workspace.optimizer.values).double() * expected


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", private_normalizers())
def test_one_example_moves_the_sum_by_its_clipped_gradient(name, accumulate):
    """Augmented, with dropout, accumulated, in physical batches of two."""
    workspace = Workspace(build(name))
    whole, less, other, alone = (
        clipped_sum(workspace, keep, name, accumulate=accumulate)
        for keep in ([*range(SIZE)], [*range(1, SIZE)], [0, *range(2, SIZE)], [0])
    )
    assert (whole - less).norm() <= CLIP * 1.0001
    assert (whole - other).norm() <= CLIP * 1.0001
    # By that example's own gradient: what is drawn for it does not depend on the others either.
    torch.testing.assert_close(whole - less, alone, rtol=0, atol=1e-4 * CLIP)
    assert alone.norm() == pytest.approx(CLIP, rel=1e-3)


class Drawing(nn.Module):
    """A network that is not ours: PyTorch's dropout, and noise of its own from other generators."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        strength = random.random() + np.random.rand()  # noqa: NPY002 - what such networks do
        return self.head(y + strength * torch.randn_like(y) * self.training)


def test_draws_of_a_network_that_is_not_ours_follow_the_example_too():
    workspace = Workspace(Drawing())
    whole, less, again = (
        clipped_sum(workspace, keep)
        for keep in ([*range(SIZE)], [*range(1, SIZE)], [*range(1, SIZE)])
    )
    assert torch.equal(less, again)
    assert (whole - less).norm() <= CLIP * 1.0001


def test_equal_examples_each_have_draws_of_their_own():
    images, labels = data(3)
    given = images[[0, 1, 0, 2, 0]], labels[[0, 1, 0, 2, 0]]
    workspace = Workspace(build("kernel"))
    whole = clipped_sum(workspace, [*range(5)], "kernel", given=given)
    for missing in (0, 2, 4):
        keep = [i for i in range(5) if i != missing]
        less = clipped_sum(workspace, keep, "kernel", given=given)
        assert 0.1 * CLIP < (whole - less).norm() <= CLIP * 1.0001
    two = clipped_sum(workspace, [0, 2], "kernel", given=given)
    one = clipped_sum(workspace, [0], "kernel", given=given)
    assert (two - 2 * one).norm() > 0.01 * CLIP


def test_names_of_examples_are_those_of_the_rest_whichever_is_taken_out():
    images, labels = data(12)
    images[[3, 7, 9]] = images[0].clone()
    labels[[3, 7, 9]] = labels[0].clone()
    labels[11], images[11] = (labels[0] + 1) % 10, images[0]
    names = example_names(images, labels)
    assert len(set(names)) == 12
    for missing in range(12):
        keep = [i for i in range(12) if i != missing]
        assert set(example_names(images[keep], labels[keep])) < set(names)
    order = random.Random(0).sample(range(12), 12)
    assert set(example_names(images[order], labels[order])) == set(names)
    # Neither shape nor label can be mistaken for pixels.
    assert set(example_names(images.transpose(1, 2), labels)).isdisjoint(names)


def test_the_layout_in_memory_does_not_matter():
    images, labels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.arange(4)
    layout = images.to(memory_format=torch.channels_last)
    assert example_names(layout, labels) == example_names(images, labels)


class Exploding(nn.Module):
    """Its gradient is not finite for an image whose first pixel is white."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(x.flatten(1))
        return scores / (1 - x.flatten(1)[:, :1])


def test_a_gradient_that_is_not_finite_moves_nothing():
    images, labels = data()
    images[:, 0, 0, 0] = 10
    images[4, 0, 0, 0] = 255
    workspace = Workspace(Exploding())
    plain = Inputs("unit")
    whole = clipped_sum(workspace, [*range(SIZE)], given=(images, labels), inputs=plain)
    keep = [i for i in range(SIZE) if i != 4]
    less = clipped_sum(workspace, keep, given=(images, labels), inputs=plain)
    assert whole.isfinite().all()
    assert whole.norm() > CLIP
    torch.testing.assert_close(whole, less, rtol=0, atol=1e-5)


# -- networks that mix examples -------------------------------------------------------------------


class Mixing(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.seen = how, 0.0
        self.head = nn.Linear(64, 10)
        self.norm = nn.BatchNorm1d(64, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.how == "mean":
            x = x - x.mean(0)
        elif self.how == "detached":
            x = x - x.mean(0).detach()
        elif self.how == "neighbour":
            x = x + 0.1 * x.roll(1, 0)
        elif self.how == "attention":
            x = torch.softmax(x @ x.T / 8, 1) @ x
        elif self.how == "batch norm":
            x = self.norm(x)
        elif self.how == "memory":
            self.seen = 0.9 * self.seen + float(x.mean())
            x = x + self.seen
        scores: Tensor = self.head(x)
        return scores


@pytest.mark.parametrize(
    "how", ["mean", "detached", "neighbour", "attention", "batch norm", "memory"]
)
@pytest.mark.parametrize("size", [2, SIZE])
def test_a_network_that_mixes_examples_is_refused(how, size):
    workspace = Workspace(Mixing(how))
    for _ in range(2):  # not only the first time
        with pytest.raises(UserError, match="cannot train this network") as caught:
            clipped_sum(workspace, [*range(size)])
        assert "\n" not in str(caught.value)


def test_the_same_network_without_mixing_trains():
    assert clipped_sum(Workspace(Mixing("not")), [*range(SIZE)]).norm() > CLIP


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten())
        self.head, self.auxiliary = nn.Linear(144, 10), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x))
        return scores


def test_what_no_forward_uses_has_no_gradient_and_what_works_in_place_trains():
    model = Unused()
    before = [p.detach().clone() for p in model.auxiliary.parameters()]
    workspace = Workspace(model)
    assert clipped_sum(workspace, [*range(SIZE)]).norm() > CLIP
    assert all(torch.equal(p, q) for p, q in zip(model.auxiliary.parameters(), before, strict=True))


def test_a_network_that_cannot_take_one_image_is_refused_in_words():
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(x.flatten(1).view(2, -1, 64)).flatten(0, 1)
            return scores

    with pytest.raises(UserError, match="on single images: "):
        clipped_sum(Workspace(Pairs()), [*range(4)])
