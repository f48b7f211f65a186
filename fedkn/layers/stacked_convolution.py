"""The convolution of several clients' maps, each by its own filters, on a GPU.

cuDNN takes it for a convolution of as many groups as there are clients. Where products may be
TF32 it is fast at that, if maps are channels last, as they are here. Where they are float32 it
launches a kernel or more for every group: 5.6 ms for the 64 clients of a layer that one launch of
ours for all (`fedkn.layers.convolution_kernels`) takes 0.6 ms for (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from fedkn.layers import circumstances, group_norm, triton_switch
from fedkn.layers.kernel.settings import Geometry
from fedkn.layers.side_by_side import clients_of, outside, put_back, taken_out
from fedkn.layers.tf32 import convolutions_take_tf32
from fedkn.layers.triton_launch import launch

__all__ = [
    "StackedConvolutions",
    "convolve_stacked",
    "convolved",
    "gradients",
    "grouped",
    "laid_out",
    "room_for_filters",
]


class StackedConvolutions(TorchFunctionMode):
    """Inside the context, convolutions under a vmap over clients are those of this module.

    And GroupNorms of maps in whatever layout can be computed there.

    Whatever else calls ``torch.conv2d``, or with settings that these kernels do not serve, gets
    PyTorch's.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do `func`."""
        if func is torch.conv2d:
            call = _Call.of(*args, **(kwargs or {}))
            if call is not None and call.served():
                return call.answer()
        if func in _GROUP_NORMS:
            return _group_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_GROUP_NORMS = (torch.group_norm, F.group_norm)


def _group_norm(  # noqa: PLR0917 - F.group_norm's order
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    del cudnn_enabled  # a switch of another library's
    if (
        triton_switch.reaches(input.device)
        and weight is not None
        and bias is not None
        and not circumstances.eager()
        and group_norm.serves(input, weight, bias)
        and input.shape[1] % num_groups == 0
    ):
        return group_norm.group_norm(input, num_groups, weight, bias, eps, relu=False)
    # Of maps laid out in another way it asks what PyTorch's vmap cannot answer.
    return F.group_norm(input.contiguous(), num_groups, weight, bias, eps)


def convolve_stacked(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return each client's convolution of its maps by its filters.

    `x` is (K, N, C, H, W), `weight` (K, O, C/groups, KH, KW), `bias` (K, O) or None; the result is
    (K, N, O, OH, OW). Products are TF32 where ``torch.backends.cudnn`` allows it for float32.
    Differentiable once.
    """
    y: Tensor = _Convolution.apply(laid_out(x, geometry), weight, bias, geometry)  # type: ignore[no-untyped-call] # torch's
    return y


class _Call(NamedTuple):
    """A call of torch.conv2d."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry

    @staticmethod
    def of(  # noqa: PLR0917 - torch.conv2d's own order
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> _Call | None:
        if isinstance(padding, str):
            return None
        kernel = (weight.shape[-2], weight.shape[-1])
        geometry = Geometry(kernel, _pair(stride), _pair(padding), _pair(dilation), groups)
        return _Call(input, weight, bias, geometry)

    def served(self) -> bool:
        stack = _functorch.get_interpreter_stack()
        return (
            stack is not None
            and len(stack) == 1
            and self.geometry.groups == 1
            and _functorch.is_batchedtensor(self.weight)
            and triton_switch.reaches(self.weight.device)
            and self.x.dtype == self.weight.dtype == torch.float32
            and self.x.dim() == 4
            and self.x.numel() > 0
            and not torch.is_autocast_enabled("cuda")
            and triton_switch.load()
        )

    def answer(self) -> Tensor:
        clients = clients_of(self.weight)
        with outside():
            x = taken_out(self.x, 0, clients)
            weight = taken_out(self.weight, 0, clients)
            bias = None if self.bias is None else taken_out(self.bias, 0, clients)
            y = convolve_stacked(x, weight, bias, self.geometry)
        return put_back(y, 0)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        if grouped(x, geometry):
            weight = room_for_filters(weight).copy_(weight)
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return convolved(x, weight, bias, geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx, dw = gradients(g, x, weight, ctx.geometry, ctx.needs_input_grad[:2])
        # An optimizer's step over all tensors at once wants them laid out as the parameters are.
        dw = None if dw is None else dw.contiguous()
        db = g.sum((1, 3, 4)) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None


def grouped(x: Tensor, geometry: Geometry) -> bool:
    """Whether cuDNN's grouped convolution takes these: half or TF32, where it was faster."""
    return x.dtype != torch.float32 or geometry.groups != 1 or convolutions_take_tf32()


def laid_out(x: Tensor, geometry: Geometry) -> Tensor:
    """Return maps (K, N, C, H, W) as `convolved` and `gradients` take them without a copy."""
    return _apart(_beside(x), len(x)) if grouped(x, geometry) else x.contiguous()


def room_for_filters(weight: Tensor) -> Tensor:
    """Return memory for (K, O, C, KH, KW) in the layout that suits a grouped convolution."""
    clients, outputs, channels, *kernel = weight.shape
    return weight.new_empty((clients, outputs, *kernel, channels)).permute(0, 1, 4, 2, 3)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return (K, N, O, OH, OW): what `convolve_stacked` does, which autograd does not see."""
    if grouped(x, geometry):
        _, stride, padding, dilation, groups = geometry
        shift = None if bias is None else bias.flatten()
        filters = _filters_beside(weight)
        y = torch.conv2d(_beside(x), filters, shift, stride, padding, dilation, len(x) * groups)
        return _apart(y, len(x))
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty((*x.shape[:2], weight.shape[1], *_output_size(x, geometry)))
    taps = weight[0, 0, 0].numel()
    strides = (weight.shape[2] * taps, taps)
    _gather((x, weight, bias), y, geometry, strides, transposed=False)
    return y


def gradients(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `x` and `weight`, None where not `wanted`, for `convolved`'s `g`."""
    dx = dw = None
    if grouped(x, geometry):
        _, stride, padding, dilation, groups = geometry
        dx, dw, _ = torch.ops.aten.convolution_backward(
            _beside(g), _beside(x), _filters_beside(weight), None, stride, padding, dilation,
            False, [0, 0], len(x) * groups, (wanted[0], wanted[1], False),
        )  # fmt: skip
        dx = None if dx is None else _apart(dx, len(x))
        return dx, None if dw is None else dw.view(weight.shape)
    g, x, weight = g.contiguous(), x.contiguous(), weight.contiguous()
    if wanted[0]:
        dx = torch.empty_like(x)
        taps = weight[0, 0, 0].numel()
        strides = (taps, weight.shape[2] * taps)
        _gather((g, weight, None), dx, geometry, strides, transposed=True)
    if wanted[1]:
        dw = _weight_gradient(x, g, weight, geometry)
    return dx, dw


def _beside(x: Tensor) -> Tensor:
    """Return maps (K, N, C, H, W) as (N, K * C, H, W), channels last."""
    return x.permute(1, 3, 4, 0, 2).contiguous().flatten(3).permute(0, 3, 1, 2)


def _apart(y: Tensor, clients: int) -> Tensor:
    """Return maps (N, K * C, H, W) as (K, N, C, H, W), where they are."""
    return y.view(len(y), clients, y.shape[1] // clients, *y.shape[2:]).movedim(1, 0)


def _filters_beside(weight: Tensor) -> Tensor:
    return weight.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _gather(
    tensors: tuple[Tensor, Tensor, Tensor | None],
    y: Tensor,
    geometry: Geometry,
    strides: tuple[int, int],
    *,
    transposed: bool,
) -> None:
    """Write into `y`; `strides` are between the weights of y's channels, and of x's."""
    from fedkn.layers import convolution_kernels as kernels  # noqa: PLC0415 - Triton is optional

    x, weight, bias = tensors
    clients, samples, channels, height, width = x.shape
    outputs, rows, columns = y.shape[2:]
    block_o, block_c = _block(outputs, 64), _block(channels, 32)
    block_m = 64 if block_o == 64 else 128
    grid = (-(-samples * rows * columns // block_m), -(-outputs // block_o), clients)
    launch(
        kernels.gather_product, grid,
        x, weight, weight if bias is None else bias.contiguous(), y,
        samples, channels, height, width, outputs, rows, columns, *strides,
        **_taps(geometry), TRANSPOSED=transposed, BIAS=bias is not None,
        BLOCK_M=block_m, BLOCK_O=block_o, BLOCK_C=block_c,
    )  # fmt: skip


def _weight_gradient(x: Tensor, g: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    from fedkn.layers import convolution_kernels as kernels  # noqa: PLC0415 - Triton is optional

    clients, samples, channels, height, width = x.shape
    outputs, rows, columns = g.shape[2:]
    inner = channels * geometry.kernel[0] * geometry.kernel[1]
    block_o, block_c, block_m = _block(outputs, 32), _block(inner, 64), 64
    tiles = -(-outputs // block_o) * -(-inner // block_c)
    pixels = -(-samples * rows * columns // block_m)
    splits = max(1, min(pixels // 4, _PROGRAMS // (tiles * clients), 16))
    parts = x.new_empty((splits, clients, outputs, inner))
    launch(
        kernels.weight_product, (tiles, splits, clients),
        x, g, parts, samples, channels, height, width, outputs, rows, columns,
        **_taps(geometry), SPLITS=splits,
        BLOCK_O=block_o, BLOCK_C=block_c, BLOCK_M=block_m,
    )  # fmt: skip
    whole = parts[0] if splits == 1 else parts.sum(0)
    return whole.view(weight.shape)


_PROGRAMS = 1024  # several for every multiprocessor


def _output_size(x: Tensor, geometry: Geometry) -> tuple[int, int]:
    height, width = (
        (x.shape[3 + d] + 2 * geometry.padding[d] - geometry.dilation[d] * (geometry.kernel[d] - 1))
        for d in range(2)
    )
    return (height - 1) // geometry.stride[0] + 1, (width - 1) // geometry.stride[1] + 1


def _block(size: int, most: int) -> int:
    """Return a power of two from 16, the least that a product takes, to `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def _taps(geometry: Geometry) -> dict[str, int]:
    sizes = zip(("K", "S", "P", "D"), geometry[:4], strict=True)
    return {name + axis: size[d] for name, size in sizes for d, axis in enumerate("HW")}


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
