from __future__ import annotations

import torch
from torch import nn

from fedkn import models, normalizers
from fedkn.tasks import CLASSIFICATION
from fedkn.training.memory import step_memory


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(size, 1, 8, 8), torch.zeros(size, dtype=torch.int64)


def test_a_layer_that_can_be_counted_by_hand():
    """ReLU keeps its output, and its gradient is as large; the scores are small beside them."""
    model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Unflatten(1, (1, 100_000)), nn.Flatten())
    model.append(nn.Linear(100_000, 2, bias=False))
    x = torch.rand(4, 1, 100_000)
    one_map = x.numel() * 4
    weight = 2 * 100_000 * 4
    peak = step_memory(model, x, torch.zeros(4, dtype=torch.int64), CLASSIFICATION)
    assert one_map <= peak <= one_map * 2 + weight + 4096


def test_it_grows_with_the_batch():
    for name in ("kernel", "batch", "group"):
        model = models.build(
            "resnet8",
            num_classes=10,
            in_channels=1,
            normalizer=normalizers.create(name),
            width=4,
            seed=0,
        )
        # A convolution's own room, which depends on the processor, is the same for any batch.
        few, more, most = (
            step_memory(model, *batch(size), CLASSIFICATION) for size in (16, 32, 64)
        )
        assert 1.5 * few < more < 2.5 * few
        assert 1.6 * (more - few) < most - more < 2.4 * (more - few)


def test_the_step_leaves_no_gradient_and_no_mark_on_the_global_generator():
    model = models.build(
        "resnet8",
        num_classes=10,
        in_channels=1,
        normalizer=normalizers.create("kernel"),
        width=4,
        seed=0,
    )
    x, labels = batch(2)
    state = torch.random.get_rng_state()
    step_memory(model, x, labels, CLASSIFICATION)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_nothing_is_printed(capfd):
    step_memory(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), *batch(2), CLASSIFICATION)
    out, err = capfd.readouterr()
    assert out == err == ""
