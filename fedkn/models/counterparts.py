"""What stands in a layer's place when a model is converted."""

from __future__ import annotations

from torch import nn

from fedkn.layers import KNConv1d, KNConv2d
from fedkn.normalizers import Normalizer

__all__ = ["counterpart", "on_one_device"]


def counterpart(normalizer: Normalizer, conv: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """Return the convolution that `normalizer` makes of the sizes of `conv`, with a norm beside it.

    For a series it is that of images where the normalizer has none.

    Raises:
        UserError: the normalizer has no such convolution.
    """
    if isinstance(conv, nn.Conv1d):
        return _of_series(normalizer, conv)
    # Four sides, which is the only form that also says what padding="same" comes to.
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return normalizer.conv(
        conv.in_channels,
        conv.out_channels,
        _pair(conv.kernel_size),
        then_norm=True,
        stride=_pair(conv.stride),
        padding=(left, right, top, bottom),
        dilation=_pair(conv.dilation),
        groups=conv.groups,
    )


def on_one_device(norm: nn.SyncBatchNorm) -> nn.BatchNorm2d:
    """Return the batch norm of one device with the settings of `norm`, and tensors of its own."""
    return nn.BatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )


def _of_series(normalizer: Normalizer, conv: nn.Conv1d) -> nn.Module:
    channels = (conv.in_channels, conv.out_channels)
    made = normalizer.conv(*channels, 3, then_norm=True, groups=conv.groups)
    left, right = conv._reversed_padding_repeated_twice
    if isinstance(made, KNConv2d):
        return KNConv1d(
            *channels,
            conv.kernel_size,
            conv.stride,
            (left, right),
            conv.dilation,
            conv.groups,
            dropout_p=made.dropout_p,
            eval_mode=made.eval_mode,
        )
    if type(made) is not nn.Conv2d:
        return made
    bias = made.bias is not None
    return nn.Conv1d(*channels, conv.kernel_size[0], groups=conv.groups, bias=bias)


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return height, width
