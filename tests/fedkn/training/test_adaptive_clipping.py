"""Adaptive gradient clipping against its equation, unit by unit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedkn import algorithms, normalizers
from fedkn.config import ExperimentConfig, TrainConfig
from fedkn.models.head import head_parameters
from fedkn.training import Inputs, LocalTask, train_locally
from fedkn.training.adaptive_clipping import AdaptiveClipping, adaptive_clip
from fedkn.training.stacked import train_stacked
from fedkn.training.stacked_batches import StackedClient
from fedkn.training.stacked_workspace import StackedWorkspace
from fedkn.training.workspace import Workspace
from tests.fedkn.training.test_local import build, data
from tests.fedkn.training.test_recorded import recording

FACTOR = 0.05


def config(**changes) -> ExperimentConfig:
    return ExperimentConfig.resolve({k.replace("__", "."): v for k, v in changes.items()})


def naive(weights: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """arXiv 2102.06171, eq. 3."""
    units = range(len(weights)) if weights.ndim > 1 else [slice(None)]
    out = gradient.copy()
    for unit in units:
        size = max(math.sqrt((weights[unit] ** 2).sum()), 1e-3)
        slope = math.sqrt((gradient[unit] ** 2).sum())
        if slope / size > FACTOR:
            out[unit] = FACTOR * size / slope * gradient[unit]
    return out


SHAPES = {"conv": (4, 3, 2, 2), "linear": (3, 5), "bias": (6,), "zero": (3, 2), "small": (2, 2)}


def tensors() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    values, gradients = (
        {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
        for _ in range(2)
    )
    values["zero"].zero_()
    gradients["small"].mul_(1e-4)
    gradients["conv"][1].zero_()
    return values, gradients


def test_every_unit_is_clipped_by_the_equation():
    values, gradients = tensors()
    before = {name: value.clone() for name, value in gradients.items()}
    rule = AdaptiveClipping(FACTOR, frozenset({"linear"}))
    rule.limit(values, gradients, stacked=False)
    for name in SHAPES:
        expected = naive(values[name].numpy(), before[name].numpy())
        if name == "linear":
            expected = before[name].numpy()
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-12, err_msg=name)
    assert torch.equal(gradients["small"], before["small"])


def test_stacked_clients_are_clipped_each_by_itself():
    values, gradients = tensors()
    others = {name: 3 * value + 1 for name, value in values.items()}
    slopes = {name: 2 * value - 1 for name, value in gradients.items()}
    stacked = {name: torch.stack([gradients[name], slopes[name]]) for name in SHAPES}
    rule = AdaptiveClipping(FACTOR)
    rule.limit(
        {name: torch.stack([values[name], others[name]]) for name in SHAPES}, stacked, stacked=True
    )
    rule.limit(values, gradients, stacked=False)
    rule.limit(others, slopes, stacked=False)
    for name in SHAPES:
        torch.testing.assert_close(stacked[name], torch.stack([gradients[name], slopes[name]]))


def test_the_setting_or_the_normalizer_decides():
    assert adaptive_clip(config()) == 0
    assert adaptive_clip(config(normalizer__name="fedwon")) == 0.16
    assert adaptive_clip(config(normalizer__name="fedwon", train__adaptive_clip=0.0)) == 0
    assert adaptive_clip(config(normalizer__name="group", train__adaptive_clip=0.3)) == 0.3
    assert AdaptiveClipping in algorithms.rule_types(config(train__adaptive_clip=0.3))
    assert AdaptiveClipping not in algorithms.rule_types(config())


def test_the_last_linear_layer_is_left_alone():
    model = build("sws")
    assert head_parameters(model) == ("head.fc.weight", "head.fc.bias")
    given = config(normalizer__name="fedwon", train__adaptive_clip=0.3)
    (_, rule) = algorithms.local_rules(given, {}, {}, model)
    assert rule == AdaptiveClipping(0.3, frozenset(head_parameters(model)))
    assert head_parameters(nn.Conv2d(1, 1, 1)) == ()


def task(*rules) -> LocalTask:
    return LocalTask(3, 2, 1, TrainConfig(batch_size=4, clip_norm=0.0), 0.5, rules)


def state(workspace: Workspace, given: LocalTask) -> dict[str, torch.Tensor]:
    workspace.load()
    train_locally(
        workspace, *data(), given, inputs=Inputs("unit"), normalizer=normalizers.create("sws")
    )
    return {name: value.clone() for name, value in workspace.state().items()}


def test_no_unit_of_a_step_moves_farther_than_rate_times_factor():
    model = build("sws")
    workspace = Workspace(model)
    rule = AdaptiveClipping(FACTOR, frozenset(head_parameters(model)))
    start = {name: value.clone() for name, value in workspace.state().items()}
    end = state(workspace, task(rule))
    free = state(workspace, task())
    for name, value in start.items():
        if name in head_parameters(model) or value.dim() < 2:
            continue
        sizes = value.flatten(1).norm(dim=1)
        moved = (end[name] - value).flatten(1).norm(dim=1)
        steps = 3  # 11 images in batches of 4, the weights growing by 2.5 % at most in each
        assert (moved <= 1.05**steps * steps * 0.5 * FACTOR * sizes).all()
    assert any(not torch.equal(end[name], free[name]) for name in end)


def test_recorded_and_stacked_clients_are_clipped_alike():
    model = build("sws")
    rule = AdaptiveClipping(FACTOR, frozenset(head_parameters(model)))
    eager = state(Workspace(build("sws")), task(rule))
    recorded = state(recording(build("sws")), task(rule))
    ((_, stacked),) = train_stacked(
        StackedWorkspace(model, 1),
        [StackedClient(task(rule), {}, *data())],
        inputs=Inputs("unit"),
        minimum_batch=1,
    )
    for name, value in eager.items():
        assert torch.equal(recorded[name], value)
        torch.testing.assert_close(stacked[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [-0.1, "sometimes"])
def test_other_values_are_refused(value):
    with pytest.raises(Exception, match=r"train\.adaptive_clip"):
        config(train__adaptive_clip=value)
