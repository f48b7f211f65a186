"""What a device can bear: batch size, local steps, threads and memory.

A profile only ever lowers what the experiment asks for: the server's config is the limit, and a
device that was set up for one experiment can take part in another. A smaller batch does not change
what a step is: more of them are accumulated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fedkn.config import ExperimentConfig, TrainConfig
from fedkn.errors import UserError
from fedkn.sections import Section, validated
from fedkn.tasks import Task
from fedkn.training import Inputs, Workspace
from fedkn.training.memory import step_memory

__all__ = ["MIB", "Profile", "fitting_batch", "is_out_of_memory", "node_profile", "step_bytes"]

MIB = 2**20


class Profile(Section):
    """The table ``[profile]`` of device.toml; 0 is no limit.

    In the node's config its keys have hyphens: ``batch-size``, ``memory-limit``, ….
    """

    batch_size: int = Field(0, ge=0, description="largest local batch")
    local_steps: int = Field(0, ge=0, description="most local steps in a round")
    threads: int = Field(0, ge=0, description="threads of a training step (0: PyTorch's choice)")
    memory_limit: int = Field(0, ge=0, description="MiB that a training step may hold in tensors")
    float32: bool = Field(
        False,
        description="compute in float32 where bfloat16 is asked for: many CPUs emulate it",
    )

    def limited(self, config: ExperimentConfig) -> ExperimentConfig:
        """Return `config` with the local steps lowered to this profile's, in its precision."""
        asked = config.train
        return config.overlay(
            train__local_steps=min(filter(None, (self.local_steps, asked.local_steps)), default=0),
            train__precision=(
                "float32" if self.float32 and asked.precision == "bfloat16" else asked.precision
            ),
        )

    def largest_batch(self, asked: int) -> int:
        """Return the largest local batch, of `asked` images at most, before memory is looked at."""
        return min(self.batch_size or asked, asked)

    def node_config(self) -> dict[str, int]:
        """Return the limits that are set as entries of the node's config."""
        return {key.replace("_", "-"): value for key, value in self.model_dump().items() if value}


def node_profile(node_config: Mapping[str, Any]) -> Profile | None:
    """Return the profile in a node's config; None for a node that is no device, but simulated.

    A device has a ``device-name``, or at least one limit.

    Raises:
        UserError: a limit that is no whole number, or negative.
    """
    given = {
        name: node_config[key]
        for name in Profile.model_fields
        if (key := name.replace("_", "-")) in node_config
    }
    if not given and "device-name" not in node_config:
        return None
    return validated(Profile, given)


def step_bytes(
    workspace: Workspace,
    inputs: Inputs,
    example: tuple[Tensor, Tensor],
    batch_size: int,
    *,
    train: TrainConfig,
    goal: Task,
) -> int:
    """Return how many bytes of tensors a training step holds at most: model, gradients, the rest.

    Measured in one batch: `batch_size` copies of `example`, an input (1, C, H, W) and its target
    (1, ...) on the workspace's device, trained on for `goal`. The model's tensors are not what they
    were afterwards.
    """
    model = sum(tensor.nbytes for tensor in workspace.state().values())
    # Of gradients and velocity.
    vectors = workspace.optimizer.values.nbytes * (2 if train.momentum else 1)
    some, targets = (one.expand(batch_size, *one.shape[1:]) for one in example)
    x = inputs(some)
    step = step_memory(workspace.model, x, targets, goal, precision=train.precision)
    return model + vectors + x.nbytes + step


def fitting_batch(
    bytes_of: Callable[[int], int], batch_size: int, *, least: int, limit: int
) -> int:
    """Return the first of `batch_size`, its half, its quarter, … that takes at most `limit` bytes.

    The smallest is measured first, by `bytes_of`, and none beyond the first that takes more: the
    device shall not run out of memory because it is measured.

    Args:
        least: the smallest batch that the normalizer can train on.

    Raises:
        UserError: not even the smallest fits.
    """
    sizes = [batch_size]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    fits = 0
    for size in reversed(sizes):
        held = bytes_of(size)
        if held > limit:
            break
        fits = size
    if not fits:
        raise UserError(
            f"a training step on {sizes[-1]} image(s) holds {held / MIB:.1f} MiB, but this "
            f"device's memory_limit is {limit / MIB:.0f}: raise it in [profile], or choose a "
            "smaller model"
        )
    return fits


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: Python's own, or PyTorch's on CPU or GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


# PyTorch has no error class of its own for the CPU's allocator.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")
