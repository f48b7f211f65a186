"""Scaling and random augmentation of whole batches, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkn.data.examples import Examples
from fedkn.errors import UserError, unknown_name

__all__ = ["SCALINGS", "augment", "augment_pieces", "channel_statistics", "scale"]

SCALINGS: tuple[str, ...] = ("unit", "centered", "standardized")
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


def scale(
    images: Tensor, scaling: str, mean: Tensor | None = None, std: Tensor | None = None
) -> Tensor:
    """Return uint8 `images` as float32, scaled.

    ``unit`` is x/255, in [0, 1]; ``centered`` is (x/255 - 0.5)/0.5, in [-1, 1]; ``standardized``
    is (x/255 - mean)/std with `mean` and `std` (C,) as `channel_statistics` gives them for the
    training images.

    Parameters
    ----------
    images
        uint8 tensor (N, C, H, W) on any device.

    Raises
    ------
    UserError
        The scaling is unknown, or is ``standardized`` and `mean` or `std` is missing.
    """
    if scaling not in SCALINGS:
        raise unknown_name("scaling", scaling, SCALINGS)
    unit = images.to(torch.float32).div_(255)
    if scaling == "unit":
        return unit
    if scaling == "centered":
        return unit.sub_(0.5).div_(0.5)
    if mean is None or std is None:
        raise UserError("scaling 'standardized' needs the training images' mean and std")
    shape = (-1, 1, 1)
    return unit.sub_(mean.to(unit).view(shape)).div_(std.to(unit).view(shape))


def channel_statistics(data: Examples) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of x/255, float32 (C,) on the CPU.

    Both are exact before the last rounding: integer histograms of the 256 values are summed over
    chunks of images. The deviation is the population's. A channel of one value gets deviation 1,
    so that standardizing it gives 0.

    Raises
    ------
    UserError
        There are no images.
    """
    if len(data) == 0:
        raise UserError("no images to take the mean and standard deviation of")
    counts = torch.zeros(data.in_channels, 256, dtype=torch.float64)
    for start in range(0, len(data), _CHUNK):
        chunk = data.inputs[start : start + _CHUNK]
        for channel in range(data.in_channels):
            values = chunk[:, channel].flatten()
            counts[channel] += torch.bincount(values, minlength=256).cpu()
    weights = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ levels
    std = (weights * (levels - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()
