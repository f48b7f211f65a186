"""SCAFFOLD's steps with momentum, as Flower's niid_bench takes them: closed forms."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from fedkn.algorithms.scaffold import Scaffold, correction, next_control
from fedkn.config import TrainConfig
from fedkn.training.optimizer import FlatSGD
from fedkn.training.rule import take_step

RATE, STEPS = 0.05, 7


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.v = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))


def after(momentum: float, slope: float, pull: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return y and c_i+ after STEPS steps on slope/2 y² + pull y, from c = 0.3 and c_i = -0.2."""
    model = Two()
    optimizer = FlatSGD(model)
    rule = Scaffold(True, momentum)
    task = SimpleNamespace(
        given={n: torch.full_like(p, 0.3) for n, p in model.named_parameters()},
        carried={f"control/{n}": torch.full_like(p, -0.2) for n, p in model.named_parameters()},
        learning_rate=RATE,
    )
    begun = rule.begin(optimizer, task)
    train = TrainConfig(momentum=momentum)
    for _ in range(STEPS):
        optimizer.gradients.copy_(slope * optimizer.values + torch.from_numpy(pull))
        take_step(optimizer, ((rule, begun),), RATE, train, clip_norm=0)
    kept = rule.end(optimizer, task, STEPS, begun)
    control = torch.cat([kept["control/u"], kept["control/v"]])
    return optimizer.values.numpy().copy(), control.numpy()


X = np.array([1.0, -2.0, 0.5])
SHIFT = 0.3 - -0.2


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_of_a_constant_gradient_the_velocities_are_geometric_sums(momentum):
    g = np.array([0.7, -0.4, 1.5])
    sums = np.array([(1 - momentum**k) / (1 - momentum) for k in range(1, STEPS + 1)])
    y, control = after(momentum, 0.0, g)
    np.testing.assert_allclose(y, X - RATE * (g * sums.sum() + STEPS * SHIFT), rtol=1e-12)
    # The mean velocity: of the correction nothing is left in it.
    np.testing.assert_allclose(control, g * sums.mean(), rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_on_a_quadratic_the_steps_are_a_linear_recurrence(momentum):
    slope, pull = 1.7, np.array([0.1, 0.2, -0.3])
    # (y, v, 1) <- A (y, v, 1), coordinate by coordinate.
    y, _ = after(momentum, slope, pull)
    for place, start in enumerate(X):
        velocity = np.array([slope, momentum, pull[place]])
        step = np.array([1 - RATE * slope, -RATE * momentum, -RATE * (pull[place] + SHIFT)])
        matrix = np.stack([step, velocity, [0.0, 0.0, 1.0]])
        expected = np.linalg.matrix_power(matrix, STEPS) @ np.array([start, 0.0, 1.0])
        np.testing.assert_allclose(y[place], expected[0], rtol=1e-12)


def test_the_next_client_begins_without_the_last_ones_velocity():
    rule = Scaffold(True, 0.9)
    optimizer = FlatSGD(Two())
    for control in (0.3, 0.1):
        given = {n: torch.full_like(p, control) for n, p in optimizer.named_values.items()}
        task = SimpleNamespace(given=given, carried={}, learning_rate=RATE)
        begun = rule.begin(optimizer, task)
        velocity = torch.cat([*optimizer.velocity().values()])
        torch.testing.assert_close(velocity, torch.full_like(velocity, control))
        optimizer.gradients.fill_(1.0)
        take_step(optimizer, ((rule, begun),), RATE, TrainConfig(momentum=0.9), clip_norm=0)


def test_control_variates_stay_on_the_device_of_the_model() -> None:
    """A GPU that is not there: tensors of two devices do not go together, and none is fetched."""
    with FakeTensorMode():
        here = {"w": torch.zeros(3, device="cuda")}
        following = next_control(here, here, here, here, steps=2, learning_rate=0.1)["w"]
        assert (following.device.type, following.dtype) == ("cuda", torch.float32)
        assert correction(here, here)["w"].device.type == "cuda"
