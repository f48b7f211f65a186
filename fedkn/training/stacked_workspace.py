"""Room for clients that are trained at once, and for what their recorded steps read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkn.errors import UserError
from fedkn.layers.kernel.dropout import dropout_stream
from fedkn.normalizers.frozen import is_fixed
from fedkn.training.captured import Captured
from fedkn.training.inputs import Inputs
from fedkn.training.recorded import Capture
from fedkn.training.stacked_batches import Batch, StackedBatches, StackedClient
from fedkn.training.transfer import moved

__all__ = ["StackedTables", "StackedWorkspace", "stackable_parameters"]


class StackedWorkspace:
    """Room for `size` clients' parameters, gradients' momentum and losses, kept between rounds.

    Args:
        model: gives the forward pass and the initial values; it is left as it is.
        size: the most clients at once.

    Raises:
        UserError: if the model has tensors that change without being trained, such as BatchNorm's
            running statistics, or parameters in several places.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        parameters, self.fixed = stackable_parameters(model)
        self.model = model
        self._kinds = _kinds(model)
        self.size = size
        self.initial = {name: p.clone() for name, p in parameters.items()}
        self.values = [_stacked(p, size) for p in self.initial.values()]
        self.velocity = [torch.zeros_like(v) for v in self.values]
        self.begun = [torch.zeros_like(v) for v in self.values]
        device = self.values[0].device
        self.losses = torch.zeros(size, dtype=torch.float64, device=device)
        self.rate = torch.zeros((), device=device)
        self.steps: dict[tuple[object, ...], Captured] = {}
        self.tables: dict[tuple[int, ...], StackedTables] = {}
        self.capture: Capture | None = Captured if device.type == "cuda" else None
        self._calls: int | None = None

    def __len__(self) -> int:
        return self.size

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.losses.device

    def load(self, clients: Sequence[StackedClient]) -> None:
        """Load what the clients received, each in its place.

        Raises:
            ValueError: too many clients, an unknown name, or a shape or dtype that differs.
            UserError: if the model's tensors are others than when the workspace was made of it, or
                are trained no more: what is stacked here would be something else.
        """
        now = _kinds(self.model)
        if odd := sorted(dict(now.items() ^ self._kinds.items())):
            raise UserError(
                f"the model is not the one that its StackedWorkspace was made of "
                f"({', '.join(odd[:3])}): make a new one after changing a model"
            )
        if len(clients) > self.size:
            raise ValueError(f"{len(clients)} clients in a workspace for {self.size}")
        for client in clients:
            if unknown := sorted(client.received.keys() - self.initial.keys()):
                raise ValueError(f"the model has no tensors named {', '.join(unknown)}")
        loaded: dict[str, Tensor] = {}
        for name, initial in self.initial.items():
            given = [client.received.get(name) for client in clients]
            if all(value is None for value in given):
                loaded[name] = initial.expand(len(clients), *initial.shape)
                continue
            for value in given:
                if value is not None and (value.shape, value.dtype) != (
                    initial.shape,
                    initial.dtype,
                ):
                    raise ValueError(
                        f"'{name}' is {value.dtype} {tuple(value.shape)}, "
                        f"the model's is {initial.dtype} {tuple(initial.shape)}"
                    )
            device = next(value.device for value in given if value is not None)
            own = initial.to(device) if any(value is None for value in given) else initial
            loaded[name] = torch.stack([own if value is None else value for value in given])
        for stacked, value in zip(self.values, moved(loaded, self.device).values(), strict=True):
            stacked[: len(clients)].copy_(value)
        for begun, value in zip(self.begun, self.values, strict=True):
            begun.copy_(value)
        for velocity in self.velocity:
            velocity.zero_()
        self.losses.zero_()

    def shared(self, clients: int) -> dict[str, Tensor]:
        """Return the frozen parameters, each as often as there are `clients`: views."""
        return {name: p.expand(clients, *p.shape) for name, p in self.fixed.items()}

    def calls(self, client: StackedClient, inputs: Inputs) -> int:
        """Return how many dropout calls a forward pass makes."""
        if self._calls is None:
            some = inputs(client.examples[:2]).contiguous()
            with dropout_stream(0) as stream, torch.no_grad():
                functional_call(self.model, {**self.fixed, **self.initial}, (some,))
            self._calls = stream.calls
        return self._calls

    def states(self, clients: int) -> list[dict[str, Tensor]]:
        """Return the tensors of each of the first `clients` clients.

        They are views, which the next `load` overwrites.
        """
        named = dict(zip(self.initial, self.values, strict=True))
        return [{name: value[place] for name, value in named.items()} for place in range(clients)]


def stackable_parameters(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters of `model` that each client has for itself, and those of all: frozen.

    Contiguous, as is what is computed on: vmap knows no other layout. Raises UserError, as
    `StackedWorkspace`.
    """
    parameters: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        kind = parameters if parameter.requires_grad else fixed
        kind[name] = parameter.detach().contiguous()
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        own = [name for name, p in module._parameters.items() if p is not None and p.requires_grad]
        if odd := [name for name in own if dot + name not in parameters]:
            raise UserError(
                f"clients of a model whose '{dot}{odd[0]}' is a parameter of another layer too "
                "cannot train together: set engine = 'inprocess'"
            )
        kept = [name for name, buffer in module._buffers.items() if buffer is not None]
        for name in kept:
            passing = name in module._non_persistent_buffers_set
            if not passing and not is_fixed(module, name):
                raise UserError(
                    f"clients of a model that keeps buffers cannot train together "
                    f"({type(module).__name__} '{prefix}' keeps {name}): set engine = 'inprocess'"
                )
    return parameters, fixed


class StackedTables:
    """What recorded steps read, at addresses that do not change: `room` steps of all clients."""

    def __init__(self, room: int, size: int, examples: Tensor, targets: Tensor, calls: int) -> None:
        """`examples` (K, B, C, H, W) and `targets` (K, B, ...) are one step's."""
        self.room = room
        self.examples = examples.new_zeros((room, size, *examples.shape[1:]))
        self.targets = targets.new_zeros((room, size, *targets.shape[1:]))
        shape, device = self.examples.shape[:3], examples.device
        self.weights = torch.zeros(shape, device=device)
        self.keys = torch.zeros((*shape[:2], calls), dtype=torch.int64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the examples, and how many dropout calls there are: what a recorded step is for."""
        return *self.examples.shape, self.keys.shape[-1]

    @staticmethod
    def of(workspace: StackedWorkspace, batches: StackedBatches) -> StackedTables:
        """Return the workspace's tables for batches of that kind, made where there are none."""
        some, wanted = batches.taken(0, 1)
        kind = (*some.shape[2:], batches.keys.shape[-1])
        if kind not in workspace.tables:
            room = _BYTES_AT_ONCE // max(1, some[:, :1].nbytes * workspace.size)
            room = max(1, min(room, _MOST_STEPS))
            workspace.tables[kind] = StackedTables(
                room, workspace.size, some[0], wanted[0], kind[-1]
            )
        return workspace.tables[kind]

    def batch(self, clients: int, inputs: Inputs) -> Batch:
        """Return the batch of the step whose turn it is, and move on to the next."""
        examples, targets, weights, keys = (
            table[:, :clients].index_select(0, self.place).squeeze(0)
            for table in (self.examples, self.targets, self.weights, self.keys)
        )
        x = inputs(examples.flatten(0, 1)).contiguous()
        self.place.add_(1)
        return Batch(x.view(*examples.shape[:2], *x.shape[1:]), targets, weights, keys)


_BYTES_AT_ONCE = 1 << 26
"""Of examples in the tables: longer rounds are taken in chunks."""
_MOST_STEPS = 256


def _stacked(parameter: Tensor, size: int) -> Tensor:
    return parameter.unsqueeze(0).repeat(size, *[1] * parameter.dim())


def _kinds(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
    """Return shape, dtype and whether it is trained, for every parameter and buffer of `model`."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: (t.shape, t.dtype, t.requires_grad) for name, t in tensors}
