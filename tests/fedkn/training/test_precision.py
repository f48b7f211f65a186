"""Training in bfloat16: near float32, in float32's parameters, and refused where it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedkn import models, normalizers
from fedkn.config import ExperimentConfig, PrivacyConfig, TrainConfig
from fedkn.errors import UserError
from fedkn.experiment import why_alone
from fedkn.training import (
    Inputs,
    LocalTask,
    LocalUpdate,
    Workspace,
    check_precision,
    precision,
    train_locally,
    train_privately,
    training_scores,
)
from fedkn.training.stacked import train_stacked
from fedkn.training.stacked_batches import StackedClient
from fedkn.training.stacked_workspace import StackedWorkspace

TRAIN = TrainConfig(batch_size=4, momentum=0.5, precision="bfloat16")
PRECISIONS = ("bfloat16", "float32")
CPU = torch.device("cpu")


def build(name: str) -> nn.Module:
    normalizer = normalizers.create(name)
    model = models.build(
        "resnet8", num_classes=5, in_channels=1, normalizer=normalizer, width=8, seed=0
    )
    return model.to(memory_format=normalizer.memory_format)


def data(size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (size, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.randint(5, (size,), generator=generator)


def trained(workspace: Workspace, name: str, **changes) -> tuple[dict[str, Tensor], LocalUpdate]:
    workspace.load()
    train = TRAIN.model_copy(update=changes)
    task = LocalTask(seed=3, round_=2, client=1, train=train, learning_rate=0.02)
    normalizer = normalizers.create(name)
    inputs = Inputs("unit", memory_format=normalizer.memory_format)
    update = train_locally(workspace, *data(), task, inputs=inputs, normalizer=normalizer)
    return {k: v.clone() for k, v in workspace.state().items()}, update


@pytest.mark.parametrize("name", normalizers.names())
def test_every_normalizer_trains_near_float32(name):
    workspace = Workspace(build(name))
    workspace.load()
    before = {k: v.clone() for k, v in workspace.state().items()}
    low, update = trained(workspace, name)
    again, _ = trained(workspace, name)
    full, wanted = trained(workspace, name, precision="float32")
    assert all(torch.equal(low[k], again[k]) for k in low)
    assert any(not torch.equal(low[k], full[k]) for k in low)
    assert update.loss == pytest.approx(wanted.loss, rel=0.05)
    assert {k: v.dtype for k, v in low.items()} == {k: v.dtype for k, v in before.items()}
    assert all(v.isfinite().all() for v in low.values())
    # One step: rounding grows from one to the next, where maps of a few pixels are normalized.
    low, full = (trained(workspace, name, local_steps=1, precision=p)[0] for p in PRECISIONS)
    parameters = [k for k, _ in workspace.model.named_parameters()]
    moved, expected = (
        torch.cat([(state[k] - before[k]).flatten() for k in parameters]) for state in (low, full)
    )
    assert (moved - expected).norm() < 0.25 * expected.norm()


@pytest.mark.parametrize("name", ["kernel", "ws_group", "batch"])
def test_convolutions_are_in_bfloat16_and_scores_are_not(name):
    model, seen = build(name).train(), set()
    convolutions = [m for m in model.modules() if "conv" in type(m).__name__.lower()]
    for layer in convolutions:
        layer.register_forward_hook(lambda layer, given, out: seen.add(out.dtype))
    scores = training_scores(model, torch.rand(3, 1, 8, 8), "bfloat16")
    assert convolutions
    assert seen == {torch.bfloat16}
    assert scores.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_gradients_and_running_statistics_stay_float32():
    workspace = Workspace(build("batch"))
    dtypes = set()
    handles = [
        p.register_hook(lambda g: dtypes.add(g.dtype)) for p in workspace.optimizer.parameters
    ]
    state, _ = trained(workspace, "batch")
    for handle in handles:
        handle.remove()
    assert dtypes == {torch.float32}
    running = [value for name, value in state.items() if name.endswith("running_var")]
    assert running
    assert {value.dtype for value in running} == {torch.float32}


def test_a_device_that_cannot_is_refused(monkeypatch):
    check_precision("bfloat16", CPU)

    def fail(*given, **named):
        raise RuntimeError("no kernel for bfloat16\nand more")

    precision._why_not.cache_clear()
    monkeypatch.setattr(precision.F, "conv2d", fail)
    try:
        check_precision("float32", CPU)
        with pytest.raises(UserError, match=r"cpu here \(no kernel for bfloat16\): set train") as e:
            check_precision("bfloat16", CPU)
    finally:
        precision._why_not.cache_clear()
    assert "\n" not in str(e.value)


def test_private_training_is_refused():
    workspace = Workspace(build("group"))
    task = LocalTask(seed=0, round_=1, client=0, train=TRAIN, learning_rate=0.1)
    with pytest.raises(UserError, match=r"set train\.precision = 'float32'"):
        train_privately(
            workspace,
            *data(),
            task,
            inputs=Inputs("unit"),
            normalizer=normalizers.create("group"),
            privacy=PrivacyConfig(mechanism="example"),
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"precision": "bfloat16"}, "in bfloat16"), ({"accumulate": 2}, "several batches")],
)
def test_clients_train_alone(change, reason):
    dotted = {f"train.{key}": value for key, value in change.items()}
    assert reason in why_alone(ExperimentConfig.resolve({"normalizer.name": "group"}, dotted))
    task = LocalTask(0, 1, 0, TrainConfig(**change), 0.1)
    client = StackedClient(task, {}, *data(4))
    with pytest.raises(ValueError, match="one batch a step, in float32"):
        train_stacked(
            StackedWorkspace(build("group"), 1), [client], inputs=Inputs("unit"), minimum_batch=1
        )
