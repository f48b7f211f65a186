"""A pass over a client's images in which layers are measured, and nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkn.layers import Moments
from fedkn.normalizers.frozen import is_at_rest
from fedkn.normalizers.rule import Forward

__all__ = ["measure", "recalibrate"]

# Images in a batch of the pass, whatever the local batch: without gradients it needs little memory.
_BATCH = 64


def measure(model: nn.Module, moments: Mapping[nn.Module, Moments], forward: Forward) -> None:
    """Take the moments of what each layer in `moments` is given, over all the client's images.

    These layers are in training mode, but in evaluation mode for a batch of one image, whose
    statistics would say nothing of the others. All else is in evaluation mode, so that dropout is
    off. Leaves `model` in training mode.
    """
    handles = [layer.register_forward_pre_hook(_take(seen)) for layer, seen in moments.items()]
    model.eval()
    try:
        forward(_BATCH)
    finally:
        for handle in handles:
            handle.remove()
    model.train()


def recalibrate(model: nn.Module, forward: Forward) -> None:
    """Set the running statistics of `model`'s BatchNorms to the moments of the client's data.

    One pass over the images. Every BatchNorm normalizes by its batch of 64, as in training; the
    mean and biased variance of all values that reach it are pooled over the batches. So a client
    of up to 64 images gets moments that fit together: evaluated on them, every layer has the
    inputs that were measured. (PreciseBN: Wu & Johnson, "Rethinking 'Batch' in BatchNorm", arXiv
    2105.07576, which averages over many batches.)
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and not is_at_rest(m)
    ]
    moments: dict[nn.Module, Moments] = {}
    for norm in norms:
        assert norm.running_mean is not None
        moments[norm] = Moments(norm.num_features, norm.running_mean.device)
        # In training mode, without it, running statistics and counter are left alone.
        norm.track_running_stats = False
    try:
        measure(model, moments, forward)
    finally:
        for norm in norms:
            norm.track_running_stats = True
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        moments[norm].write(norm.running_mean, norm.running_var)


def _take(moments: Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        (x,) = inputs
        layer.train(len(x) > 1)
        moments(x)

    return hook
