"""DP-SGD against a loop that takes one example at a time, and against closed forms."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedkn import models, normalizers
from fedkn.algorithms.fedprox import FedProx
from fedkn.algorithms.scaffold import Scaffold
from fedkn.config import PrivacyConfig, TrainConfig
from fedkn.errors import UserError
from fedkn.layers import dropout_stream
from fedkn.normalizers import Normalizer
from fedkn.seeds import derive, numpy_generator
from fedkn.training import Inputs, LocalTask, Workspace, train_locally
from fedkn.training.kept_momentum import KeptMomentum
from fedkn.training.privacy_spent import PrivacySpent
from fedkn.training.private import (
    poisson_batch,
    refuse_unprivate,
    steps_of_a_round,
    train_privately,
)

TRAIN = TrainConfig(batch_size=2, local_epochs=2, momentum=0.9, weight_decay=1e-3, clip_norm=1e-9)
TASK = LocalTask(seed=3, round_=2, client=1, train=TRAIN, learning_rate=0.05)
NOISY = PrivacyConfig(mechanism="example", noise_multiplier=0.8, clip_norm=0.5)
CLIPPED = PrivacyConfig(mechanism="example", noise_multiplier=0.0, clip_norm=0.05)
OPEN = PrivacyConfig(mechanism="example", noise_multiplier=0.0, clip_norm=1e9)
PLAIN = Inputs("unit")
AUGMENTED = Inputs("unit", flip=True, crop_padding=1)


class Doubled(Inputs):
    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images).double()


def suitable() -> list[str]:
    """Go by the models: whatever has no buffers must work."""
    names = normalizers.names()
    return [n for n in names if not list(build(n).buffers())]


def build(name: str, architecture: str = "resnet8") -> nn.Module:
    normalizer = normalizers.create(name)
    model = models.build(
        architecture, num_classes=10, in_channels=1, normalizer=normalizer, width=4, seed=0
    )
    return model.to(memory_format=normalizer.memory_format)


def data(size: int = 7, side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 1, side, side), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def trained(model, task=TASK, privacy=NOISY, *, inputs=PLAIN, given=None, name="group", state=None):
    workspace = model if isinstance(model, Workspace) else Workspace(model)
    workspace.load(state or {})
    images, labels = given or data()
    update = train_privately(
        workspace,
        images,
        labels,
        task,
        inputs=inputs,
        normalizer=normalizers.create(name),
        privacy=privacy,
    )
    return {k: v.clone() for k, v in workspace.state().items()}, update


def key_of(task: LocalTask, step: int, images: Tensor, labels: Tensor, i: int) -> int:
    """Return the seed of an example's draws, where no two examples are equal."""
    content = b"%s%d:" % (repr(tuple(images.shape[1:])).encode(), int(labels[i]))
    digest = hashlib.blake2b(content + images[i].numpy().tobytes(), digest_size=16).hexdigest()
    return derive(task.seed, "example", task.round_, task.client, step, f"{digest}-0")


def naive(model: nn.Module, given, privacy, task=TASK):
    """One example's loss at a time, with its own masks; no noise."""
    images, labels = given
    x = (images.float() / 255).double()
    expected = min(task.train.batch_size, len(labels))
    steps = task.train.local_epochs * -(-len(labels) // task.train.batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=task.learning_rate, momentum=0.9, weight_decay=1e-3
    )
    sizes = []
    for step in range(steps):
        where = (task.round_, task.client, step)
        draws = numpy_generator(task.seed, "poisson", *where).random(len(labels))
        batch = [i for i, draw in enumerate(draws) if draw < expected / len(labels)]
        sizes.append(len(batch))
        sums = [torch.zeros_like(p) for p in model.parameters()]
        for i in batch:
            with dropout_stream(derive(key_of(task, step, images, labels, i), "network")):
                scores = model.train()(x[i : i + 1])
            loss = nn.functional.cross_entropy(scores, labels[i : i + 1])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient, alpha=min(1.0, privacy.clip_norm / (norm + 1e-6)))
        for parameter, total in zip(model.parameters(), sums, strict=True):
            parameter.grad = total / expected
        optimizer.step()
    return dict(model.state_dict()), sizes


@pytest.mark.parametrize("privacy", [CLIPPED, OPEN], ids=["clipped", "open"])
@pytest.mark.parametrize("name", suitable())
def test_without_noise_it_is_the_naive_loop(name, privacy):
    """Every normalizer, in its memory format, with its dropout, an empty batch among them."""
    task = replace(TASK, client=0)
    ours, update = trained(build(name).double(), task, privacy, inputs=Doubled("unit"), name=name)
    theirs, sizes = naive(build(name).double(), data(), privacy, task)
    assert 0 in sizes
    assert max(sizes) > 2
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-7, msg=key)
    assert update.epsilon == math.inf


@pytest.mark.parametrize("architecture", ["mobilenet_v2", "densenet20x16", "knresnet13"])
@pytest.mark.parametrize("name", ["group", "ws_group", "kernel"])
def test_other_networks(architecture, name):
    """Depthwise convolutions, concatenation, pre-activation."""
    train = TRAIN.model_copy(update={"local_epochs": 1, "batch_size": 4})
    task, given = replace(TASK, train=train), data(side=16)
    ours, _ = trained(
        build(name, architecture).double(),
        task,
        CLIPPED,
        inputs=Doubled("unit"),
        given=given,
        name=name,
    )
    theirs, _ = naive(build(name, architecture).double(), given, CLIPPED, task)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_full_batches_without_noise_are_plain_training():
    # All examples in every batch, as in train_locally with one batch for an epoch.
    train = TrainConfig(batch_size=99, local_epochs=3, momentum=0.5, clip_norm=0.0)
    task = replace(TASK, train=train, rules=(FedProx(0.3), Scaffold()))
    correction = {n: torch.full_like(p, 0.01) for n, p in build("group").named_parameters()}
    task = replace(task, given=correction)
    workspace = Workspace(build("group"))
    ours, update = trained(workspace, task, OPEN)
    workspace.load()
    plain = train_locally(
        workspace, *data(), task, inputs=Inputs("unit"), normalizer=normalizers.create("group")
    )
    for key, value in workspace.state().items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert update.loss == pytest.approx(plain.loss, rel=1e-5)
    assert (update.examples, update.steps) == (plain.examples, plain.steps) == (21, 3)


# -- noise and sampling ---------------------------------------------------------------------------


def test_the_noise_has_the_deviation_that_the_accountant_is_told():
    """With and without noise, one step: the difference is the noise, times the rate."""
    train = TrainConfig(batch_size=2, local_steps=1)
    task = replace(TASK, train=train, learning_rate=0.5)
    workspace = Workspace(build("group"))
    silent = PrivacyConfig(mechanism="example", noise_multiplier=0.0, clip_norm=0.5)
    noise = []
    for client in range(8):
        one = replace(task, client=client)
        loud, quiet = (trained(workspace, one, p)[0] for p in (NOISY, silent))
        noise.append(torch.cat([((loud[k] - quiet[k]) / 0.5).flatten() for k in loud]))
    z = torch.stack(noise).double() / (0.8 * 0.5 / 2)
    count = z.numel()
    assert count > 20_000
    assert z.mean().abs() < 4 / count**0.5
    assert abs(z.std() - 1) < 4 / (2 * count) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / count) ** 0.5
    correlations = torch.corrcoef(z) - torch.eye(8)
    assert correlations.abs().max() < 5 / z.shape[1] ** 0.5


def test_an_empty_batch_is_a_step_of_noise():
    given = data(size=40)
    train = TrainConfig(batch_size=1, local_steps=1)
    draws = (poisson_batch(40, 1 / 40, numpy_generator(3, "poisson", 2, c, 0)) for c in range(99))
    client = next(c for c, batch in enumerate(draws) if not len(batch))
    task = replace(TASK, train=train, client=client)
    before = build("group").state_dict()
    after, update = trained(build("group"), task, NOISY, given=given)
    moved = torch.cat([(after[k] - before[k]).flatten() for k in before]) / 0.05
    assert moved.std().item() == pytest.approx(0.8 * 0.5, rel=0.05)
    assert (update.loss, update.steps, update.examples) == (0.0, 1, 1)
    assert update.epsilon == PrivacySpent().after(0.8, 1 / 40, 1).epsilon(NOISY.delta)


def test_poisson_batches_are_binomial():
    generator = numpy_generator(0)
    batches = [poisson_batch(50, 0.06, generator) for _ in range(4000)]
    sizes = np.array([len(batch) for batch in batches])
    expected = [4000 * math.comb(50, k) * 0.06**k * 0.94 ** (50 - k) for k in range(8)]
    found = [(sizes == k).sum() for k in range(8)]
    chi = sum((f - e) ** 2 / e for f, e in zip(found, expected, strict=True))
    assert chi < 26  # 8 degrees of freedom at most: one in a thousand
    counts = torch.cat(batches).bincount(minlength=50)
    assert (counts - 240).abs().max() < 5 * math.sqrt(4000 * 0.06 * 0.94)


def test_the_same_task_gives_the_same_bits():
    workspace = Workspace(build("kernel"))
    first, report = trained(workspace, inputs=AUGMENTED, name="kernel")
    again, _ = trained(workspace, inputs=AUGMENTED, name="kernel")
    fresh, _ = trained(build("kernel"), inputs=AUGMENTED, name="kernel")
    assert all(torch.equal(first[k], again[k]) and torch.equal(first[k], fresh[k]) for k in first)
    assert report.epsilon is not None
    for change in ({"seed": 4}, {"round_": 3}, {"client": 2}):
        other, _ = trained(workspace, replace(TASK, **change), inputs=AUGMENTED, name="kernel")
        assert any(not torch.equal(first[k], other[k]) for k in first)


def test_secret_noise_cannot_be_replayed():
    secret = NOISY.model_copy(update={"secret": True})
    (one, first), (two, second) = (trained(build("group"), privacy=secret) for _ in range(2))
    assert all(not torch.equal(one[k], two[k]) for k in one)
    assert first.epsilon == second.epsilon


# -- rounds ---------------------------------------------------------------------------------------


def test_ten_rounds_cost_what_their_steps_cost_together():
    carried, epsilons = {}, []
    workspace = Workspace(build("group"))
    for round_ in range(1, 11):
        task = replace(TASK, round_=round_, carried=carried)
        _, update = trained(workspace, task)
        carried = update.carried
        whole = PrivacySpent().after(0.8, 2 / 7, 8 * round_)
        assert update.epsilon == whole.epsilon(NOISY.delta)
        epsilons.append(update.epsilon)
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] > 1.5 * epsilons[0]


@pytest.mark.parametrize("size", [0, 1, 7, 100])
@pytest.mark.parametrize("change", [{}, {"accumulate": 3}, {"local_steps": 3}, {"batch_size": 200}])
def test_what_a_round_will_cost_is_known_before(size, change):
    train = TRAIN.model_copy(update=change)
    _, update = trained(build("group"), replace(TASK, train=train), given=data(size))
    told = PrivacySpent().after(*steps_of_a_round(size, train, NOISY))
    assert PrivacySpent.restored(update.carried) == told


def test_momentum_is_kept_beside_the_privacy_spent():
    first = replace(TASK, rules=(KeptMomentum(),))
    between, update = trained(build("group"), first, OPEN)
    assert {name.partition("/")[0] for name in update.carried} == {"momentum", "privacy"}
    kept = replace(first, round_=3, carried=update.carried)
    lost = replace(first, round_=3)
    one, other = (trained(build("group"), t, OPEN, state=between)[0] for t in (kept, lost))
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_no_examples_cost_nothing():
    before = build("group").state_dict()
    after, update = trained(build("group"), given=data(size=0))
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert (update.steps, update.epsilon) == (0, 0.0)


def test_nothing_is_left_behind_where_a_step_broke_off():
    workspace = Workspace(build("ws_group"))
    clean, _ = trained(workspace, name="ws_group")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    images, _ = data()
    with pytest.raises(IndexError):
        trained(workspace, given=(images, torch.full((7,), 10)), name="ws_group")
    assert torch.equal(torch.rand(3), expected)  # the global generator is as it was
    again, _ = trained(workspace, name="ws_group")
    assert all(torch.equal(clean[k], again[k]) for k in clean)


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(normalizers.names()) - set(suitable())))
def test_normalizers_with_statistics_of_batches_are_refused(name):
    with pytest.raises(UserError, match="kernel, group, ws_group"):
        trained(build(name), name=name)


def test_batch_norm_is_refused_with_the_reason():
    with pytest.raises(UserError, match="'batch' normalizes every example by the others"):
        trained(build("batch"), name="batch")


def test_whatever_keeps_statistics_is_refused():
    model = nn.Sequential(build("group"), nn.BatchNorm1d(10))
    with pytest.raises(UserError, match=r"keeps '1\.running_mean'"):
        refuse_unprivate(normalizers.create("group"), model, "float32")


@pytest.mark.parametrize("name", normalizers.names())
def test_normalizers_say_truly_whether_they_mix_examples(name):
    """Another second image changes the scores of those before and after it, or it does not."""
    normalizer: Normalizer = normalizers.create(name)
    scores = []
    for second in (0, 1):
        model = build(name).double().train()
        normalizer.begin_training(model, 1)
        images = torch.rand(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator())
        images[1] = second * torch.rand(1, 8, 8, dtype=torch.float64)
        with dropout_stream(1):
            scores.append(model(images)[[0, 2]])
    assert normalizer.mixes_examples != torch.allclose(*scores, rtol=1e-9)
