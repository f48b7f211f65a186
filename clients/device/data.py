"""A device's own images: loaded, and held against the images of the experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedkn.config import DataConfig, ExperimentConfig
from fedkn.data import sources
from fedkn.data.augmentation import channel_statistics
from fedkn.data.examples import Examples, Source
from fedkn.data.summary import DataSummary
from fedkn.data.torchvision_sources import TORCHVISION_SOURCES
from fedkn.errors import UserError, unknown_name
from fedkn.experiment import data_summary
from fedkn.text import printable

__all__ = [
    "KINDS",
    "OwnData",
    "describe",
    "label_counts",
    "load_own",
    "node_data",
    "summary_here",
    "summary_of",
]

KINDS = ("image_folder", "arrays", *TORCHVISION_SOURCES)


@dataclass(frozen=True)
class OwnData:
    """Where a device's images are: node config ``data-path``, and of which `kind` of source."""

    path: str
    kind: str = ""


def node_data(node_config: Mapping[str, Any]) -> OwnData | None:
    """Return the data named in a node's config; None where it has no ``data-path``.

    Raises:
        UserError: an unknown ``data-kind``, or one without a path.
    """
    path, kind = str(node_config.get("data-path", "")), str(node_config.get("data-kind", ""))
    if kind and not path:
        raise UserError(f"data-kind is '{kind}', but there is no data-path: give the images' place")
    if kind and kind not in KINDS:
        raise unknown_name("kind of data", kind, KINDS)
    return OwnData(path, kind) if path else None


def load_own(own: OwnData, data: DataConfig, wanted: DataSummary | None) -> Examples:
    """Return the device's images, labelled as `wanted`, the experiment's, has it.

    They are all that are there, but for those set apart as test images: ``test/`` of a folder,
    ``test_images`` of an .npz, torchvision's test part. Image folders are resized to the
    experiment's size. Classes are matched by name; the device may lack some. Without `wanted` the
    images are as they are.

    Raises:
        UserError: no such data, unreadable data, or images whose classes, channels or size are
            not the experiment's.
    """
    kind = own.kind or _kind(own, data)
    size = _image_size(data, wanted) if kind == "image_folder" else 0
    try:
        source = sources.load(kind, own.path, image_size=size, skip_damaged=data.skip_damaged)
    except UserError as error:
        raise UserError(f"this device's data: {error}") from error
    images = _whole(source) if source.held_out else source.train
    if wanted is None:
        return images
    try:
        return wanted.conformed(images)
    except UserError as error:
        raise UserError(f"this device's data in '{own.path}' {error}") from None


def summary_here(config: ExperimentConfig) -> DataSummary | None:
    """Return the summary of the experiment's source where this device can read it, else None.

    Nothing is downloaded.
    """
    try:
        return data_summary(config.overlay(data__download=False))
    except UserError:
        return None


def summary_of(images: Examples) -> DataSummary:
    """Return the summary of a device's own `images`, as if they were the experiment's."""
    return DataSummary.of(images, channel_statistics(images))


def label_counts(images: Examples) -> dict[str, int]:
    """Return the number of examples of every class, in their order; nothing without classes."""
    if images.labels is None:
        return {}
    counts = torch.bincount(images.labels, minlength=images.num_classes)
    return dict(zip(images.classes, counts.tolist(), strict=True))


def describe(images: Examples) -> str:
    """Return in one line how many examples there are, of which kind, and of each label."""
    kind = DataSummary.of(images)
    counts = label_counts(images)
    shown = ", ".join(
        f"{printable(name, 40)}: {count}" for name, count in list(counts.items())[:_SHOWN]
    )
    more = f", … {len(counts) - _SHOWN} more classes" if len(counts) > _SHOWN else ""
    what = "images" if len(kind.shape) == 3 else "examples"
    return f"{len(images)} {what} {kind.inputs} ({shown or f'targets: {kind.targets}'}{more})"


_SHOWN = 20


def _kind(own: OwnData, data: DataConfig) -> str:
    """Return what lies at the path: a file is an .npz, a folder what the experiment uses."""
    if own.path.endswith(".npz"):
        return "arrays"
    return data.source if data.source in TORCHVISION_SOURCES else "image_folder"


def _image_size(data: DataConfig, wanted: DataSummary | None) -> int:
    if wanted is None:
        return data.image_size
    sides = wanted.shape[1:]
    return sides[0] if len(sides) == 2 and sides[0] == sides[1] else 0


def _whole(source: Source) -> Examples:
    return source.train.joined(source.test)
