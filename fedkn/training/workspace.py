"""A model kept in memory, into which client after client is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedkn.errors import UserError
from fedkn.training.host_recorder import HostRecorder
from fedkn.training.optimizer import FlatSGD
from fedkn.training.recorded import StepRecorder
from fedkn.training.standing import Standing
from fedkn.training.transfer import moved

__all__ = ["Workspace"]


class Workspace:
    """One model, kept in memory, into which the state of client after client is loaded.

    Whatever `load` is not given goes back to its initial value, so nothing of one client reaches
    the next. The model's parameters become views of one vector (see `FlatSGD`).

    Attributes:
        recorder: records the model's local steps on CUDA. host_recorder: on the CPU. None on other
            devices, where each is computed as it comes.

    Raises UserError where a model cannot be trained so, as `FlatSGD`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._take_over(FlatSGD(model))
        self._initial = {name: tensor.clone() for name, tensor in self._tensors.items()}
        # Buffers outside the state (persistent=False) cannot be loaded, but must not be passed on.
        self._passing = {name: buffer.clone() for name, buffer in self._transient.items()}

    def attached(self) -> FlatSGD:
        """Return the optimizer, after a look whether it still moves the model's own tensors.

        Ordinary calls part them: ``model.zero_grad()``, ``.to()``, ``.double()``,
        ``load_state_dict(assign=True)``, ``requires_grad_()``, a second Workspace. Then the model
        as it is now is taken over again, with the values that it has and the optimizer's momentum
        as far as it belongs to parameters that are still trained.

        Raises:
            UserError: if the model has tensors of other names or shapes than it had.
        """
        if self._standing.holds():
            self.optimizer.tie_gradients()
            return self.optimizer
        now = self.model.state_dict() | dict(self.model.named_buffers())
        found = {name: t.shape for name, t in now.items()}
        had = {name: t.shape for name, t in (self._initial | self._passing).items()}
        if found != had:
            odd = sorted(dict(found.items() ^ had.items()))
            raise UserError(
                f"the model is not the one that its Workspace was made of ({', '.join(odd[:3])}): "
                "make a new Workspace after changing a model"
            )
        before = self.optimizer
        self._take_over(FlatSGD(self.model))
        self.optimizer.resume(before)
        self._initial = _cast(self._initial, self._tensors)
        self._passing = _cast(self._passing, self._transient)
        return self.optimizer

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.optimizer.values.device

    def load(self, *states: Mapping[str, Tensor]) -> None:
        """Load tensors by name, later `states` over earlier ones, the rest as initialised.

        The optimizer forgets its momentum.

        Raises:
            ValueError: if a name is unknown or a shape or dtype differs.
            UserError: as `attached`.
        """
        optimizer = self.attached()
        given: dict[str, Tensor] = {}
        for state in states:
            given.update(moved(state, self.device))
        if unknown := sorted(given.keys() - self._tensors.keys()):
            raise ValueError(f"the model has no tensors named {', '.join(unknown)}")
        for name, tensor in self._tensors.items():
            value = given.get(name, self._initial[name])
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(
                    f"'{name}' is {tuple(value.shape)} {value.dtype}, but the model's is "
                    f"{tuple(tensor.shape)} {tensor.dtype}"
                )
            tensor.copy_(value)
        for name, buffer in self._transient.items():
            buffer.copy_(self._passing[name])
        optimizer.restart()

    def state(self) -> dict[str, Tensor]:
        """Return the model's tensors by name: views, which the next `load` overwrites."""
        return dict(self._tensors)

    def _take_over(self, optimizer: FlatSGD) -> None:
        self.optimizer = optimizer
        # What was recorded reads tensors where they were.
        self.recorder = StepRecorder(self) if self.device.type == "cuda" else None
        self.host_recorder = HostRecorder(self) if self.device.type == "cpu" else None
        # Detached tensors share memory with the model: copying into them loads a state in place.
        self._tensors = {name: value.detach() for name, value in self.model.state_dict().items()}
        self._transient = {
            name: buffer for name, buffer in self.model.named_buffers() if name not in self._tensors
        }
        self._standing = Standing(self.model)


def _cast(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(like[name]) for name, value in values.items()}
