"""The embedded digits in five domains, for feature shift: the same classes look different."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from fedkn.data.digits import load_digits
from fedkn.data.examples import Examples, Origins, Source
from fedkn.seeds import numpy_generator

__all__ = ["DOMAINS", "load_digits_domains"]

_BACKGROUND = 160.0
_NOISE = 64.0


def load_digits_domains() -> Source:
    """Return the digits of `load_digits`, a fifth of them in each of the domains of `DOMAINS`.

    Every digit is there once, in one domain: which, is drawn class by class, so that the domains
    differ in how digits look and in nothing else. Training and test digits are those of `digits`.
    The draws are always the same.
    """
    plain = load_digits()
    return replace(
        plain,
        name="digits_domains",
        train=_in_domains(plain.train, "training"),
        test=_in_domains(plain.test, "test"),
    )


def _in_domains(data: Examples, part: str) -> Examples:
    rng = numpy_generator(0, "domains of digits", part)
    domains = np.empty(len(data), dtype=np.int64)
    # One after another through the classes, so that the domains are equally large too.
    order = rng.permutation(len(data))
    order = order[np.argsort(data.targets.numpy()[order], kind="stable")]
    domains[order] = np.arange(len(data)) % len(DOMAINS)
    pixels = data.inputs.numpy().astype(np.float64)
    for number, change in enumerate(DOMAINS.values()):
        own = domains == number
        pixels[own] = change(pixels[own], rng)
    images = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return replace(
        data,
        inputs=torch.from_numpy(images),
        origins=Origins(torch.from_numpy(domains), tuple(DOMAINS)),
    )


def _inversion(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dark digits on white."""
    return 255.0 - images


def _stroke(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Thicker strokes: the largest of each pixel and its four neighbours (dilation by a cross)."""
    thick: np.ndarray = np.max([images, *_neighbours(images)], axis=0)
    return thick


def _blur(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurred by the binomial filter of 3 x 3 (weights 1 2 1 along each axis, over 16)."""
    up, down, left, right = _neighbours(images)
    above, below = (_neighbours(moved)[2:] for moved in (up, down))
    corners = sum((*above, *below), np.zeros_like(images))
    filtered: np.ndarray = (4 * images + 2 * (up + down + left + right) + corners) / 16
    return filtered


def _background(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Behind the ink a ramp of grey, 0 to 160, in a direction of each image's own."""
    height, width = images.shape[2:]
    angles = rng.uniform(0, 2 * np.pi, (len(images), 1, 1, 1))
    rows = np.linspace(-1, 1, height)[:, None]
    columns = np.linspace(-1, 1, width)[None, :]
    # From -sqrt(2) to sqrt(2) at the corners.
    along = (rows * np.sin(angles) + columns * np.cos(angles)) / np.sqrt(2)
    behind: np.ndarray = np.maximum(images, _BACKGROUND * (along + 1) / 2)
    return behind


def _noise(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of deviation 64 on every pixel, cut off at 0 and 255."""
    return images + _NOISE * rng.standard_normal(images.shape)


def _neighbours(images: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return `images` (N, C, H, W) moved by a pixel up, down, left and right; black comes in."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return (
        padded[:, :, 2:, 1:-1],
        padded[:, :, :-2, 1:-1],
        padded[:, :, 1:-1, 2:],
        padded[:, :, 1:-1, :-2],
    )


DOMAINS: Mapping[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "inversion": _inversion,
    "stroke": _stroke,
    "blur": _blur,
    "background": _background,
    "noise": _noise,
}
"""What is done to the images (N, C, H, W), float64 of 0..255, of each domain."""
