from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedkn.training import FlatSGD


def network(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    model[3].bias.requires_grad = False
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(5, 2, 4, 4, generator=generator),
            torch.randint(4, (5,), generator=generator),
        )
        for _ in range(count)
    ]


def flat_training(optimizer: FlatSGD, model, data, rate, **options) -> None:
    for x, y in data:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(rate, **options)


def torch_training(model, data, rate, *, momentum, weight_decay, clip_norm) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=rate, momentum=momentum, weight_decay=weight_decay)
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(trainable, clip_norm)
        optimizer.step()


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@settings(deadline=None, max_examples=40)
@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 1e-2]),
    clip_norm=st.sampled_from([0.0, 0.1, 1e4]),
    rate=st.floats(1e-3, 0.1),
    steps=st.integers(1, 6),
)
def test_it_is_torchs_sgd_after_clip_grad_norm(momentum, weight_decay, clip_norm, rate, steps):
    ours, theirs = network(), network()
    options = {"momentum": momentum, "weight_decay": weight_decay, "clip_norm": clip_norm}
    flat_training(FlatSGD(ours), ours, batches(steps), rate, **options)
    torch_training(theirs, batches(steps), rate, **options)
    assert_close(ours, theirs)


def test_the_second_client_starts_without_the_firsts_momentum():
    options = {"momentum": 0.9, "weight_decay": 1e-3, "clip_norm": 1.0}
    ours, theirs = network(), network()
    optimizer = FlatSGD(ours)
    for client in range(2):
        optimizer.restart()
        flat_training(optimizer, ours, batches(3, client), 0.1, **options)
        torch_training(theirs, batches(3, client), 0.1, **options)  # a new optimizer each
    assert_close(ours, theirs)


def test_restart_drops_gradients_too():
    model = network()
    optimizer = FlatSGD(model)
    (x, y), *_ = batches(1)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.restart()
    before = optimizer.values.clone()
    optimizer.step(1.0, momentum=0.9, weight_decay=0.0, clip_norm=0.0)
    assert torch.equal(optimizer.values, before)


def test_parameters_and_gradients_are_views_of_the_vectors():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = FlatSGD(model)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert optimizer.values.numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer.values.fill_(2.0)
    optimizer.gradients.fill_(3.0)
    for parameter in optimizer.parameters:
        assert (parameter == 2).all()
        assert parameter.grad is not None
        assert (parameter.grad == 3).all()
    assert not (model[3].bias == 2).any()


def test_channels_last_weights_stay_so_and_train_alike():
    ours, theirs = network().to(memory_format=torch.channels_last), network()
    options = {"momentum": 0.9, "weight_decay": 1e-3, "clip_norm": 0.5}
    flat_training(FlatSGD(ours), ours, batches(3), 0.1, **options)
    torch_training(theirs, batches(3), 0.1, **options)
    assert ours[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(ours, theirs)


def test_an_undefined_gradient_is_not_hidden_by_clipping():
    """The weights become NaN, as with torch, and the server's gate refuses them."""
    model = network()
    optimizer = FlatSGD(model)
    optimizer.gradients.fill_(float("nan"))
    optimizer.step(0.1, momentum=0.0, weight_decay=0.0, clip_norm=1.0)
    assert optimizer.values.isnan().all()


def test_parameters_of_two_kinds_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="share one dtype and device"):
        FlatSGD(model)
    with pytest.raises(ValueError, match="no parameter to train"):
        FlatSGD(nn.Identity())
