"""Whether two models give the same outputs, tried on inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedkn.errors import UserError
from fedkn.models.copying import copied

__all__ = ["Comparison"]

_SIDES = (32, 64, 224, 299, 96, 28, 16, 8)
_TOLERANCE = 1e-9  # of float64: two orders above what summing in another order leaves


class Comparison:
    """The outputs of a model, to hold those of changed copies of it against.

    `model` is what is to be copied and changed: the model itself in float64, where it can be run
    so, that no rounding hides a difference.

    Args:
        model: in the mode in which it is to be compared; it is left alone.
        example_input: what its forward takes; None: two images of noise, of the channels of its
            first convolution, of a size that it takes.

    Raises UserError where no such size is found, or the model does not take the `example_input`.
    """

    def __init__(self, model: nn.Module, example_input: Tensor | Sequence[Tensor] | None) -> None:
        self.model = model
        self._expected: list[Tensor] | None = None
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            return
        if isinstance(example_input, Tensor):
            example_input = (example_input,)
        first: Exception | None = None
        tried = [tuple(example_input)] if example_input is not None else _noise(model)
        for inputs in tried:
            for doubled in (True, False):
                self.model = copied(model).double() if doubled else model
                self._inputs = [_double(x) for x in inputs] if doubled else list(inputs)
                try:
                    self._expected = self._run(self.model)
                except Exception as error:  # the model's own code may raise anything
                    first = first or error
                    continue
                return
        given = "the example_input" if example_input is not None else "images of any size tried"
        reason = (str(first).splitlines() or [type(first).__name__])[0]
        raise UserError(
            f"{type(model).__name__} does not take {given} ({reason}): give example_input=, what "
            "its forward takes"
        ) from first

    def same(self, other: nn.Module) -> bool:
        """Return whether `other`, made of a copy of `self.model`, gives the same outputs.

        To rounding; True where there are no numbers, on "meta".
        """
        if self._expected is None:
            return True
        try:
            found = self._run(other)
        except Exception:  # such as an attribute that is no longer there
            return False
        return len(found) == len(self._expected) and all(map(self._close, found, self._expected))

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return False
        if not expected.is_floating_point() or not expected.numel():
            return torch.equal(found, expected)
        tolerance = _TOLERANCE
        if expected.dtype != torch.float64:
            tolerance = 1e3 * torch.finfo(expected.dtype).eps
        finite = expected[expected.isfinite()]
        largest = finite.abs().max().item() if len(finite) else 0.0
        return torch.allclose(
            found, expected, rtol=0.0, atol=tolerance * max(largest, 1e-30), equal_nan=True
        )

    def _run(self, model: nn.Module) -> list[Tensor]:
        twin = copied(model)  # a forward may leave marks
        with torch.no_grad(), _fixed_draws():
            outputs = twin(*(x.clone() for x in self._inputs))
        return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _noise(model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    assert conv is not None  # else there would be nothing to fold
    for side in _SIDES:
        draw = torch.Generator().manual_seed(side)
        x = torch.randn(2, conv.in_channels, side, side, generator=draw)
        yield (x.to(conv.weight),)


@contextmanager
def _fixed_draws() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
