"""Stochastic gradient descent on one flat vector: a few operations a step, whatever the depth."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedkn.errors import UserError

__all__ = ["FlatSGD", "shared_kind", "trainable"]


class FlatSGD:
    """SGD with momentum, L2 weight decay and clipping of the gradient's norm.

    All trainable parameters of `model` are moved into one contiguous vector, and their gradients
    into another; the parameters become views. A small network has dozens of tensors of a few
    hundred elements, for which torch.optim's per-tensor work costs as much as the backward pass.
    The update is ``torch.optim.SGD``'s (dampening 0, no Nesterov) after
    ``torch.nn.utils.clip_grad_norm_``, equal to float32 rounding.

    Attributes:
        values, gradients: the vectors. named_values, named_gradients: they by parameter, as views.
        started: whether a step was taken since `restart`.

    Raises:
        UserError: if the trainable parameters differ in dtype or device, have no shape yet (lazy
            modules), or there are none.
    """

    def __init__(self, model: nn.Module) -> None:
        named = trainable(model)
        self.parameters = list(named.values())
        dtype, device = shared_kind(named)
        size = sum(p.numel() for p in self.parameters)
        self.values = torch.empty(size, dtype=dtype, device=device)
        self.gradients = torch.zeros(size, dtype=dtype, device=device)
        self._velocity = torch.zeros(size, dtype=dtype, device=device)
        self.started = False
        self._named_velocity: dict[str, Tensor] = {}
        self.named_values: dict[str, Tensor] = {}
        self.named_gradients: dict[str, Tensor] = {}
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        offset = 0
        for name, parameter in named.items():
            span = slice(offset, offset + parameter.numel())
            self._named_velocity[name] = _laid_out(self._velocity[span], parameter)
            values = _laid_out(self.values[span], parameter)
            values.copy_(parameter.detach())
            gradient = _laid_out(self.gradients[span], parameter)
            self._gradients.append((parameter, gradient))
            self.named_values[name], self.named_gradients[name] = values, gradient
            parameter.grad = gradient
            parameter.data = values
            offset = span.stop

    def tie_gradients(self) -> None:
        """Make the parameters' gradients views of the vector again, where they are not: zeros.

        ``model.zero_grad()`` takes them away, and PyTorch then makes others that nobody reads.
        """
        for parameter, gradient in self._gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
                gradient.zero_()

    def restart(self, velocity: Mapping[str, Tensor] | None = None) -> None:
        """Begin with a new client: with the `velocity` of all parameters by name, or none."""
        if self.started:
            self._velocity.zero_()
        self.started = bool(velocity)
        for name, value in (velocity or {}).items():
            self._named_velocity[name].copy_(value)
        self.zero_grad()

    def resume(self, other: FlatSGD) -> None:
        """Go on with the momentum of `other`, where it is of parameters that are here as well."""
        for name, value in other.velocity().items():
            own = self._named_velocity.get(name)
            if own is not None and own.shape == value.shape:
                self.started = True
                own.copy_(value)

    def velocity(self) -> dict[str, Tensor]:
        """Return the momentum's velocity by parameter: views; empty before the first step."""
        return dict(self._named_velocity) if self.started else {}

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return one tensor per parameter, by name, as a vector laid out as `values` is."""
        vector = torch.empty_like(self.values)
        for name, part in self.named(vector).items():
            part.copy_(tensors[name])
        return vector

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector laid out as `values` is as one tensor per parameter, by name: views."""
        parts: dict[str, Tensor] = {}
        offset = 0
        for name, parameter in zip(self._named_velocity, self.parameters, strict=True):
            span = slice(offset, offset + parameter.numel())
            parts[name] = _laid_out(vector[span], parameter)
            offset = span.stop
        return parts

    def zero_grad(self) -> None:
        """Set the gradients to zero in place, so that they stay views of the flat vector."""
        self.gradients.zero_()

    def step(
        self,
        learning_rate: float | Tensor,
        *,
        momentum: float,
        weight_decay: float,
        clip_norm: float,
    ) -> None:
        """Take one step: `limit` the gradient, and `move` by it."""
        self.limit(clip_norm=clip_norm, weight_decay=weight_decay)
        self.move(learning_rate, momentum=momentum)

    @torch.no_grad()
    def limit(self, *, clip_norm: float, weight_decay: float) -> None:
        """Clip the gradient's norm (0: no clipping), and add the L2 penalty's gradient."""
        gradient = self.gradients
        if clip_norm:
            norm = torch.linalg.vector_norm(gradient)
            gradient.mul_((clip_norm / (norm + 1e-6)).clamp_(max=1.0))
        if weight_decay:
            gradient.add_(self.values, alpha=weight_decay)

    @torch.no_grad()
    def move(self, learning_rate: float | Tensor, *, momentum: float) -> None:
        """Move the values by the gradient as it is, with momentum.

        A `learning_rate` on the device, without dimensions, is read there when the step is taken.
        """
        gradient = self.gradients
        if momentum:
            # Zero before the first step: no branch, so that a recorded step can be any of them.
            gradient = self._velocity.mul_(momentum).add_(gradient)
        self.started = True
        if isinstance(learning_rate, Tensor):
            self.values.addcmul_(gradient, learning_rate, value=-1.0)
        else:
            self.values.add_(gradient, alpha=-learning_rate)

    @property
    def changed(self) -> tuple[Tensor, ...]:
        """What a step writes to."""
        return self.values, self.gradients, self._velocity


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shared_kind(named: Mapping[str, nn.Parameter]) -> tuple[torch.dtype, torch.device]:
    """Return the one dtype and device that parameters, by name, are to be trained with.

    Raises:
        UserError: they differ in these, have no shape yet, or there are none.
    """
    first: tuple[str, torch.dtype, torch.device] | None = None
    for name, parameter in named.items():
        if is_lazy(parameter):
            raise UserError(
                f"'{name}' of the model has no shape yet: send a batch through the model first"
            )
        if first is None:
            first = (name, parameter.dtype, parameter.device)
        elif first[1:] != (parameter.dtype, parameter.device):
            raise UserError(
                "the parameters that are trained must share one dtype and device, but "
                f"'{first[0]}' is {first[1]} on {first[2]} and '{name}' is {parameter.dtype} on "
                f"{parameter.device}: use model.to(...), or freeze one by requires_grad_(False)"
            )
    if first is None:
        raise UserError("the model has no parameter to train: requires_grad is off for all")
    return first[1:]


def _laid_out(flat: Tensor, parameter: Tensor) -> Tensor:
    """View `flat` as a tensor of the shape of `parameter`, and in its memory format."""
    last = torch.channels_last
    if parameter.dim() != 4 or not parameter.is_contiguous(memory_format=last):
        return flat.view(parameter.shape)
    outputs, inputs, height, width = parameter.shape
    return flat.view(outputs, height, width, inputs).permute(0, 3, 1, 2)
