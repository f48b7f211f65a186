"""``fedkn predict``: what a trained model sees in images."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkn.errors import UserError
from fedkn.text import printable
from simulations.commands import options as o

if TYPE_CHECKING:
    from torch import Tensor

    from simulations.programs.classifier import Card, Classifier
    from simulations.programs.image_files import ImageFile

__all__ = ["predict"]

# A path is shown whole, for it is to be found again.
_LONGEST = 4096
_NAMED = 20


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

    IMAGES are files or folders. Exits with 1 if some of them cannot be read: they are named, and
    the others classified. They become grey or RGB as the model needs; those of another size
    are cropped to the model's proportions around their centre and resized. Use .pt2 files only
    from people you trust: such a file can run code when it is loaded.

    Examples:

      fedkn predict model.onnx photo.png scans/

      fedkn predict runs/demo --cell kernel-b2-dirichlet0.3-s0 photo.png --json
    """
    import torch

    from simulations.programs.image_files import find_images, read_images

    paths = find_images(images)
    classifier = _classifier(model, cell)
    card = classifier.card
    files, failed = read_images(paths, card.channels, card.height, card.width)
    probabilities = classifier.probabilities(torch.stack([file.pixels for file in files]))
    if as_json:
        _write_json(model, card, files, probabilities, failed)
    else:
        _show(card, files, probabilities)
    if failed:
        _say_failed(failed, len(paths))
        raise typer.Exit(1)


def _classifier(path: Path, cell: str | None) -> Classifier:
    if path.is_dir():
        from simulations.programs.trained_model import load_trained_model

        trained = load_trained_model(path, cell)
        if not trained.recorded:
            sys.stderr.write(
                f"'{path}' recorded nothing of its data: classes and scaling are those of the data "
                "as they are now, which may be others\n"
            )
        return trained.classifier
    from simulations.programs.program import load_program

    if cell is not None:
        raise UserError(f"--cell chooses a cell of a run folder; '{path}' is not one")
    return load_program(path)


def _show(card: Card, files: list[ImageFile], probabilities: Tensor) -> None:
    from rich.text import Text

    from simulations.terminal import terminal
    from simulations.whole_table import WholeTable

    table = WholeTable(box=None, padding=(0, 2, 0, 0))
    table.add_column("image")
    table.add_column("class")
    table.add_column("probability", justify="right")
    best, index = probabilities.max(1)
    for file, probability, label in zip(files, best.tolist(), index.tolist(), strict=True):
        # Text, because a bracket in a file's name is not markup.
        shown = (printable(file.path, _LONGEST), printable(card.classes[label]))
        table.add_row(*map(Text, shown), f"{probability:.1%}")
    console = terminal()
    console.print(table)
    resized = [file for file in files if file.resized_from]
    if resized and resized[0].resized_from:
        width, height = resized[0].resized_from
        console.print(
            f"Resized to the model's {card.width}x{card.height} pixels: {len(resized)} of "
            f"{len(files)} images ({printable(resized[0].path, _LONGEST)} is {width}x{height}).",
            soft_wrap=True,
        )


def _say_failed(failed: dict[Path, str], number: int) -> None:
    from simulations.terminal import terminal

    console = terminal(stderr=True)
    for path, why in list(failed.items())[:_NAMED]:
        console.print(f"cannot use '{printable(path, _LONGEST)}': it {why}", soft_wrap=True)
    more = f" ({len(failed) - _NAMED} more than those named)" if len(failed) > _NAMED else ""
    console.print(f"{len(failed)} of {number} images cannot be used{more}.", soft_wrap=True)


def _write_json(
    model: Path,
    card: Card,
    files: list[ImageFile],
    probabilities: Tensor,
    failed: dict[Path, str],
) -> None:
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
        "failed": [{"image": str(path), "reason": why} for path, why in failed.items()],
    }
    sys.stdout.write(json.dumps(shown) + "\n")
