"""A step over several batches is that over one batch of all their examples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedkn import models, normalizers
from fedkn.algorithms.fedprox import FedProx
from fedkn.algorithms.scaffold import Scaffold
from fedkn.config import PrivacyConfig, TrainConfig
from fedkn.training import (
    Inputs,
    LocalTask,
    LocalUpdate,
    Workspace,
    plan_batches,
    train_locally,
    train_privately,
)
from fedkn.training.memory import peak_bytes

ALONE = [n for n in normalizers.names() if not normalizers.create(n).mixes_examples]
TRAIN = TrainConfig(batch_size=2, momentum=0.9, weight_decay=1e-3, clip_norm=0.5)
COUNTS = ("examples", "steps", "skipped_batches", "skipped_examples")


class Doubled(Inputs):
    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images).double()


def build(name: str) -> nn.Module:
    return models.build(
        "resnet8",
        num_classes=5,
        in_channels=1,
        normalizer=normalizers.create(name),
        width=4,
        dropout_p=0.0,
        seed=0,
    ).double()


def data(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(256, (size, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.randint(5, (size,), generator=generator)


def task_of(train: TrainConfig, **changes) -> LocalTask:
    return LocalTask(seed=3, round_=2, client=1, train=train, learning_rate=0.05, **changes)


def trained(
    workspace: Workspace, task: LocalTask, size: int, name: str, **options
) -> tuple[dict[str, Tensor], LocalUpdate]:
    workspace.load()
    update = train_locally(
        workspace,
        *data(size),
        task,
        inputs=Doubled("unit", **options),
        normalizer=normalizers.create(name),
    )
    return {k: v.clone() for k, v in workspace.state().items()}, update


def assert_equal(
    one: tuple[dict[str, Tensor], LocalUpdate], other: tuple[dict[str, Tensor], LocalUpdate]
) -> None:
    assert [getattr(one[1], c) for c in COUNTS] == [getattr(other[1], c) for c in COUNTS]
    assert one[1].loss == pytest.approx(other[1].loss, rel=1e-6)
    for key, value in one[0].items():
        torch.testing.assert_close(other[0][key], value, rtol=1e-6, atol=1e-8, msg=key)


SHAPES = {
    "size": st.integers(1, 23),
    "batch": st.integers(1, 5),
    "accumulate": st.integers(1, 5),
    "epochs": st.integers(1, 2),
    "cap": st.integers(0, 4),
}


@settings(deadline=None, max_examples=200)
@given(**SHAPES, largest=st.integers(0, 6))
def test_the_plan_has_the_same_examples_in_every_step(largest, size, batch, accumulate, **caps):
    shared = {"local_epochs": caps["epochs"], "local_steps": caps["cap"]}
    draws = {"seed": 5, "round_": 1, "client": 0}
    small = TrainConfig(batch_size=batch, accumulate=accumulate, **shared)
    large = TrainConfig(batch_size=batch * accumulate, **shared)
    plan = plan_batches(size, small, 1, largest_batch=largest, **draws)
    whole = plan_batches(size, large, 1, **draws)
    assert [torch.cat(step).tolist() for step in plan.steps] == [b.tolist() for b in whole.batches]
    assert plan.examples == whole.examples == sum(map(len, plan.batches))
    assert max(map(len, plan.batches)) <= min(batch, largest or batch)
    assert max(map(len, plan.steps)) <= accumulate * -(-batch // min(batch, largest or batch))


@given(
    size=st.integers(1, 60), batch=st.integers(2, 9), largest=st.integers(1, 9), least=st.just(2)
)
def test_what_is_too_small_after_dividing_is_counted(size, batch, largest, least):
    train = TrainConfig(batch_size=batch, accumulate=2)
    plan = plan_batches(size, train, least, seed=0, round_=1, client=0, largest_batch=largest)
    assert plan.examples + plan.skipped_examples == size
    assert all(least <= len(b) <= min(batch, largest) for b in plan.batches)
    assert all(plan.steps)
    # Divided evenly, three or more to a batch leave no single example over.
    if largest >= 3:
        assert plan.skipped_examples == (size % batch == 1)


@settings(deadline=None, max_examples=12)
@given(**SHAPES)
def test_it_is_one_larger_batch(size, batch, accumulate, epochs, cap):
    """Ragged ends, several epochs and a cap; momentum, decay, clipping, augmentation."""
    shared = {"local_epochs": epochs, "local_steps": cap}
    small = TRAIN.model_copy(update={"batch_size": batch, "accumulate": accumulate, **shared})
    large = TRAIN.model_copy(update={"batch_size": batch * accumulate, **shared})
    workspace = Workspace(build("group"))
    options = {"flip": True, "crop_padding": 1}
    one, other = (
        trained(workspace, task_of(t, rules=(FedProx(0.3),)), size, "group", **options)
        for t in (small, large)
    )
    assert_equal(one, other)


@pytest.mark.parametrize("name", ALONE)
def test_it_is_so_for_every_normalizer_that_does_not_mix_examples(name):
    """Under SCAFFOLD's correction, which every step of the optimizer adds once."""
    model = build(name)
    correction = {n: torch.full_like(p, 0.01) for n, p in model.named_parameters()}
    workspace = Workspace(model)
    small = TRAIN.model_copy(update={"accumulate": 3})
    large = TRAIN.model_copy(update={"batch_size": 6})
    one, other = (
        trained(workspace, task_of(t, rules=(Scaffold(),), given=correction), 15, name)
        for t in (small, large)
    )
    assert_equal(one, other)
    assert (one[1].steps, one[1].examples) == (3, 15)


def test_it_is_not_a_step_for_every_batch():
    workspace = Workspace(build("group"))
    one, update = trained(
        workspace, task_of(TRAIN.model_copy(update={"accumulate": 3})), 15, "group"
    )
    other, more = trained(workspace, task_of(TRAIN), 15, "group")
    assert (update.steps, more.steps) == (3, 8)
    assert any(not torch.allclose(one[k], other[k], rtol=1e-3) for k in one)


def test_a_device_that_divides_its_batches_ends_in_the_same_weights():
    train = TRAIN.model_copy(update={"batch_size": 5, "accumulate": 2})
    workspace = Workspace(build("ws_group"))
    whole = trained(workspace, task_of(train), 23, "ws_group")
    for largest in (1, 2, 4, 5, 9):
        assert_equal(
            whole, trained(workspace, task_of(train, largest_batch=largest), 23, "ws_group")
        )


def test_a_batch_too_small_for_the_normalizer_is_left_out_of_its_step():
    train = TRAIN.model_copy(update={"accumulate": 2, "momentum": 0.0})
    _, update = trained(Workspace(build("batch")), task_of(train), 7, "batch")
    assert (update.examples, update.steps) == (6, 2)
    assert (update.skipped_batches, update.skipped_examples) == (1, 1)


def test_memory_is_that_of_one_batch():
    workspace, (images, labels) = Workspace(build("group")), data(16)

    def peak(train: TrainConfig) -> int:
        def run() -> None:
            workspace.load()
            train_locally(
                workspace,
                images,
                labels,
                task_of(train),
                inputs=Doubled("unit"),
                normalizer=normalizers.create("group"),
            )

        return peak_bytes(run, torch.device("cpu"))

    small = peak(TrainConfig(batch_size=2))
    assert peak(TrainConfig(batch_size=2, accumulate=8)) < 1.2 * small
    assert peak(TrainConfig(batch_size=16)) > 3 * small


# -- with differential privacy --------------------------------------------------------------------


@pytest.mark.parametrize("divided", [(4, 0), (2, 1), (1, 3)])
@pytest.mark.parametrize("name", ["group", "kernel"])
def test_a_private_step_is_that_of_one_batch(name, divided):
    """The same draws, the same clipped sum, the same noise once, the same epsilon."""
    privacy = PrivacyConfig(mechanism="example", noise_multiplier=0.8, clip_norm=0.05)
    accumulate, largest = divided
    small = TRAIN.model_copy(update={"batch_size": 8 // accumulate, "accumulate": accumulate})
    large = TRAIN.model_copy(update={"batch_size": 8})
    workspace = Workspace(build(name))
    results = []
    for task in (task_of(small, largest_batch=largest), task_of(large)):
        workspace.load()
        update = train_privately(
            workspace,
            *data(23),
            replace(task, rules=(FedProx(0.1),)),
            inputs=Doubled("unit", flip=True),
            normalizer=normalizers.create(name),
            privacy=privacy,
        )
        results.append(({k: v.clone() for k, v in workspace.state().items()}, update))
    assert_equal(*results)
    assert results[0][1].epsilon == results[1][1].epsilon
    assert results[0][1].steps == 3
