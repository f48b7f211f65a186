"""Scaling and random augmentation of whole batches, on any device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedkn.data.examples import Examples
from fedkn.errors import UserError, unknown_name

__all__ = [
    "SCALINGS",
    "augment",
    "augment_pieces",
    "channel_statistics",
    "check_augmentation",
    "check_scaling",
    "scale",
]

SCALINGS: tuple[str, ...] = ("unit", "centered", "standardized", "none")
_CHUNK = 4096


def augment(
    images: Tensor, generator: torch.Generator, *, flip: bool = False, crop_padding: int = 0
) -> Tensor:
    """Crop each image at random, then flip it left-right with probability 1/2.

    The crop pads each side with `crop_padding` zeros and takes a window of the image's own size
    at a uniform position. Augment the uint8 images, before `scale`, and the padding is black.

    Parameters
    ----------
    images
        (N, C, H, W), any dtype, any device. Returned as it is when neither option is set.
    generator
        Draws are made on its device, so a CPU generator gives the same result on every device.
        What is drawn depends on N and on the two options alone.

    Raises
    ------
    UserError
        `crop_padding` is negative.
    """
    return augment_pieces(images, [len(images)], [generator], flip=flip, crop_padding=crop_padding)


def augment_pieces(
    images: Tensor,
    sizes: Sequence[int],
    generators: Iterable[torch.Generator],
    *,
    flip: bool = False,
    crop_padding: int = 0,
) -> Tensor:
    """Do to each piece of `images`, `sizes` long, what `augment` does with its own generator.

    The draws are made piece by piece, the images are moved all at once.

    Raises
    ------
    UserError
        `crop_padding` is negative.
    """
    if crop_padding < 0:
        raise UserError(f"data.crop_padding must be at least 0, got {crop_padding}")
    if not flip and not crop_padding:
        return images
    count, channels, height, width = images.shape
    flips, corners = [], []
    for size, generator in zip(sizes, generators, strict=True):
        if flip:
            drawn = torch.rand(size, 1, generator=generator, device=generator.device)
            flips.append(drawn.cpu() < 0.5)
        if crop_padding:
            drawn = torch.randint(
                2 * crop_padding + 1, (2, size, 1), generator=generator, device=generator.device
            )
            corners.append(drawn.cpu())
    rows = torch.arange(height).expand(count, height)
    columns = torch.arange(width).expand(count, width)
    if flip:
        columns = torch.where(torch.cat(flips), width - 1 - columns, columns)
    if crop_padding:
        top, left = torch.cat(corners, 1)
        images = F.pad(images, [crop_padding] * 4)
        rows, columns = rows + top, columns + left
    flat = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).view(count, 1, height * width)
    index = flat.to(images.device).expand(count, channels, height * width)
    return images.flatten(2).gather(2, index).view(count, channels, height, width)


def check_augmentation(data: Examples, *, flip: bool, crop_padding: int) -> None:
    """Raise UserError if `data` cannot be augmented so: it must be images."""
    if not flip and not crop_padding:
        return
    if len(data.shape) != 3:
        sides = "x".join(map(str, data.shape))
        raise UserError(
            f"data.flip and data.crop_padding are for images (C, H, W), and these inputs are "
            f"{sides}: leave them at false and 0, and augment in your own source"
        )


def scale(
    inputs: Tensor, scaling: str, mean: Tensor | None = None, std: Tensor | None = None
) -> Tensor:
    """Return a batch of `inputs` as float32, scaled.

    Of uint8 images ``unit`` is x/255, in [0, 1]; ``centered`` is (x/255 - 0.5)/0.5, in [-1, 1];
    ``standardized`` is (x/255 - mean)/std with `mean` and `std` (C,) as `channel_statistics` gives
    them for the training inputs. Of any other type ``standardized`` is (x - mean)/std, computed in
    float64 and rounded once. ``none`` leaves the numbers as they are; int32 and int64 stay
    integers, because they may be indices.

    Parameters
    ----------
    inputs
        (N, C, ...) on any device.

    Raises
    ------
    UserError
        The scaling is unknown or not one of the inputs' type, or is ``standardized`` and `mean` or
        `std` is missing.
    """
    check_scaling(scaling, inputs.dtype)
    if scaling == "none":
        # A copy, because a network may change what it is given in place.
        dtype = inputs.dtype if inputs.dtype in _MAYBE_INDICES else torch.float32
        return inputs.to(dtype, copy=True)
    if scaling == "standardized" and (mean is None or std is None):
        raise UserError("scaling 'standardized' needs the training inputs' mean and std")
    if inputs.dtype != torch.uint8:
        assert mean is not None
        assert std is not None
        wide = inputs.to(torch.float64, copy=True)
        return wide.sub_(_along(mean, wide)).div_(_along(std, wide)).to(torch.float32)
    unit = inputs.to(torch.float32).div_(255)
    if scaling == "unit":
        return unit
    if scaling == "centered":
        return unit.sub_(0.5).div_(0.5)
    assert mean is not None
    assert std is not None
    return unit.sub_(_along(mean, unit)).div_(_along(std, unit))


def check_scaling(scaling: str, dtype: torch.dtype) -> None:
    """Raise UserError if inputs of `dtype` cannot be scaled so, or nothing is."""
    if scaling not in SCALINGS:
        raise unknown_name("scaling", scaling, SCALINGS)
    if scaling in ("unit", "centered") and dtype != torch.uint8:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"scaling '{scaling}' is for uint8, whose values are 0..255, not for {name}: set "
            "data.scaling = 'standardized', or scale them yourself and set 'none'"
        )


def channel_statistics(data: Examples) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel (axis 1) of the inputs, (C,) on the CPU.

    Of uint8 they are those of x/255 in float32, exact before the last rounding: integer histograms
    of the 256 values are summed over chunks of images. Of any other type they are those of x in
    float64: sums of chunks are added exactly, and squares are taken of what remains without the
    mean (Chan, Golub and LeVeque, The American Statistician 37 (1983), eq. 1.7), so that a large
    mean beside a small deviation costs no digits. The deviation is the population's. A channel of
    one value gets deviation 1, so that standardizing it gives 0.

    Raises
    ------
    UserError
        There are no examples, or numbers too large for the square of any to be a float64.
    """
    if len(data) == 0:
        raise UserError("no examples to take the mean and standard deviation of")
    if data.inputs.dtype != torch.uint8:
        return _wide_statistics(data.inputs)
    channels = data.shape[0]
    counts = torch.zeros(channels, 256, dtype=torch.float64)
    for start in range(0, len(data), _CHUNK):
        chunk = data.inputs[start : start + _CHUNK]
        for channel in range(channels):
            values = chunk[:, channel].flatten()
            counts[channel] += torch.bincount(values, minlength=256).cpu()
    weights = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ levels
    std = (weights * (levels - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def _wide_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    each = inputs[:1].numel()
    rows = max(1, _NUMBERS // each)
    channels = inputs.shape[1]
    chunks = range(0, len(inputs), rows)
    count = inputs.numel() // channels

    def chunk(start: int, channel: int) -> np.ndarray:
        part: np.ndarray = inputs[start : start + rows, channel].cpu().to(torch.float64).numpy()
        return part.reshape(-1)

    means, deviations = [], []
    # NumPy adds on one thread: the same sums whatever the number of threads is.
    for channel in range(channels):
        first_value = float(inputs[0, channel].flatten()[0])
        lowest = highest = first_value
        sums, left, squares = [], [], []
        with np.errstate(over="ignore", invalid="ignore"):
            for start in chunks:
                values = chunk(start, channel)
                lowest, highest = min(lowest, values.min()), max(highest, values.max())
                sums.append(values.sum() / count)
            mean = _exact_sum(sums)
            for start in chunks:
                rest = chunk(start, channel) - mean
                left.append(rest.sum())
                squares.append(np.square(rest).sum())
        error = _exact_sum(left) / count
        variance = _exact_sum(squares) / count - error * error
        if not math.isfinite(mean + variance):
            raise UserError(
                f"channel {channel} of the inputs holds numbers too large to be standardized: "
                "scale them down, or set data.scaling = 'none'"
            )
        constant = lowest == highest
        means.append(first_value if constant else mean + error)
        deviations.append(1.0 if constant else math.sqrt(max(variance, 0.0)) or 1.0)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(deviations, dtype=torch.float64)


def _exact_sum(values: Sequence[float]) -> float:
    """Return the sum, rounded once; NaN where it is beyond float64."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.nan


def _along(figures: Tensor, inputs: Tensor) -> Tensor:
    return figures.to(inputs).view(-1, *(1,) * (inputs.ndim - 2))


_NUMBERS = 1 << 22
_MAYBE_INDICES = (torch.int32, torch.int64)
