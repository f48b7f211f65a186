"""The fused CPU kernels of `fedkn.layers.native`, ``kn_conv*.h``: their autograd is in C++ too."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkn.layers.kernel import definition
from fedkn.layers.kernel.settings import Geometry, Settings
from fedkn.layers.native.library import serves

__all__ = ["backward", "forward", "of_clients", "serves"]


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings) -> Tensor:
    """Return `definition.convolution`, gradients by hand."""
    keys = None if settings.key is None else [int(settings.key)]
    return of_clients(x, weight, bias, settings, keys)


def of_clients(  # noqa: PLR0917 - as `forward`, then what differs
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: Settings,
    keys: list[int] | None,
    clients: int = 1,
) -> Tensor:
    """Do what `forward` does for several clients, each with filters and a key of its own.

    `x` is (N, clients * C, H, W), `weight` (clients * O, C/groups, KH, KW), `bias` (clients * O,)
    or None, `keys` has one for each client, in place of the settings' key. Returns
    (N, clients * O, OH, OW).
    """
    geometry, _, _, level, eps, relu, keeps_output = settings
    _, stride, padding, dilation, groups = geometry
    y: Tensor = torch.ops.fedkn_native.convolution.default(
        x, weight, bias, stride, padding, dilation, groups, clients, keys, level, eps, relu,
        keeps_output,
    )  # fmt: skip
    return y


def backward(  # noqa: PLR0917 - the operator's order
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    clients: int,
    keys: list[int] | None,
    level: int,
    eps: float,
    relu: bool,
    *wanted: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of (x, weight, bias), None where not wanted. Arguments: the operator's.

    These have derivatives of their own, which are rare, so it is left to autograd, by the
    definition. Gradients without are taken in C++, by the operator's own autograd.
    """
    kernel, step, zeros, spread = (
        (size[0], size[1]) for size in (weight.shape[2:], stride, padding, dilation)
    )
    geometry = Geometry(kernel, step, zeros, spread, groups)
    n = geometry.unit_size(weight.shape[1] * groups)
    settings = Settings(geometry, n, None, level, eps, relu)
    with torch.enable_grad():
        # Aliases: where one of them depends on another, that is no concern of this layer's.
        x, weight = x.view_as(x), weight.view_as(weight)
        bias = None if bias is None else bias.view_as(bias)
        sources = [t for t, w in zip((x, weight, bias), wanted, strict=True) if w and t is not None]
        parts = zip(
            x.chunk(clients, 1),
            weight.chunk(clients),
            [None] * clients if bias is None else bias.chunk(clients),
            [None] * clients if keys is None else keys,
            strict=True,
        )
        y = torch.cat(
            [definition.convolution(a, w, b, settings._replace(key=k)) for a, w, b, k in parts], 1
        )
        found = iter(torch.autograd.grad(y, sources, g, create_graph=True))
    return tuple(next(found) if w else None for w in wanted)


# Before the library is there to declare it: PyTorch keeps it until then. Not as a composite: the
# exporters look up every operator that has one, and fail where it is not declared.
torch.library.impl("fedkn_native::gradients", "Autograd")(backward)
