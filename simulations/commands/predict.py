"""``fedkn predict``: what a trained model sees in images."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkn.errors import UserError
from simulations.commands import options as o

if TYPE_CHECKING:
    from torch import Tensor

    from simulations.classifier import Card, Classifier
    from simulations.image_files import ImageFile

__all__ = ["predict"]


def predict(
    *,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="PROGRAM|RUN", help="A .onnx or .pt2 file of fedkn export, or a run folder."
        ),
    ],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES…", help="Image files, or folders of them.")
    ],
    cell: Annotated[
        str | None,
        typer.Option(
            metavar="CELL", help="Of a run: which cell's model, unless one alone is finished."
        ),
    ] = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Classify images with a program of fedkn export, or with the newest checkpoint of a run.

    IMAGES are files or folders. They become grey or RGB as the model needs; those of another size
    are cropped to the model's proportions around their centre and resized. Use .pt2 files only
    from people you trust: such a file can run code when it is loaded.

    Examples:

      fedkn predict model.onnx photo.png scans/

      fedkn predict runs/demo --cell kernel-b2-dirichlet0.3-s0 photo.png --json
    """
    import torch

    from simulations.image_files import find_images, read_image

    paths = find_images(images)
    classifier = _classifier(model, cell)
    card = classifier.card
    files = [read_image(path, card.channels, card.height, card.width) for path in paths]
    probabilities = classifier.probabilities(torch.stack([file.pixels for file in files]))
    if as_json:
        _write_json(model, card, files, probabilities)
    else:
        _show(card, files, probabilities)


def _classifier(path: Path, cell: str | None) -> Classifier:
    if path.is_dir():
        from simulations.trained_model import load_trained_model

        trained = load_trained_model(path, cell)
        if not trained.recorded:
            sys.stderr.write(
                f"'{path}' recorded nothing of its data: classes and scaling are those of the data "
                "as they are now, which may be others\n"
            )
        return trained.classifier
    from simulations.programs import load_program

    if cell is not None:
        raise UserError(f"--cell chooses a cell of a run folder; '{path}' is not one")
    return load_program(path)


def _show(card: Card, files: list[ImageFile], probabilities: Tensor) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    best, index = probabilities.max(1)
    for file, probability, label in zip(files, best.tolist(), index.tolist(), strict=True):
        # Text, because a bracket in a file's name is not markup.
        table.add_row(Text(str(file.path)), Text(card.classes[label]), f"{probability:.1%}")
    console = Console()
    console.print(table)
    resized = [file for file in files if file.resized_from]
    if resized and resized[0].resized_from:
        width, height = resized[0].resized_from
        console.print(
            f"Resized to the model's {card.width}x{card.height} pixels: {len(resized)} of "
            f"{len(files)} images ({resized[0].path} is {width}x{height}).",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _write_json(model: Path, card: Card, files: list[ImageFile], probabilities: Tensor) -> None:
    predictions = [
        {
            "image": str(file.path),
            "class": card.classes[int(row.argmax())],
            "probability": float(row.max()),
            "probabilities": row.tolist(),
            "resized_from": file.resized_from,
        }
        for file, row in zip(files, probabilities, strict=True)
    ]
    shown = {
        "model": str(model),
        "cell": card.cell,
        "round": card.round,
        "classes": card.classes,
        "size": [card.width, card.height],
        "predictions": predictions,
    }
    sys.stdout.write(json.dumps(shown) + "\n")
