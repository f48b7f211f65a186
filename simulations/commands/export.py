"""``fedkn export``: a trained model as a program for devices."""

# ruff: noqa: PLC0415 - torch takes seconds to import, and --help does not need it

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkn.text import printable
from simulations.commands import options as o

if TYPE_CHECKING:
    from simulations.programs.program import Written
    from simulations.programs.trained_model import TrainedModel

__all__ = ["export"]


class Target(StrEnum):
    """The formats; each is the ending of the file's name as well."""

    ONNX = "onnx"
    PT2 = "pt2"


def export(
    *,
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    cell: Annotated[
        str | None,
        typer.Option(
            metavar="CELL", help="Which cell's model (not needed if one alone is finished)."
        ),
    ] = None,
    to: Annotated[
        Target,
        typer.Option(help="onnx: for any ONNX runtime. pt2: for PyTorch, by torch.export.load."),
    ] = Target.ONNX,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Output",
            help="Where it goes (default: RUN/cells/CELL/model.onnx or .pt2).",
        ),
    ] = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Write the trained global model of a run folder as a program that runs without fedkn.

    The program takes images as they are, float32 pixels from 0 to 255 (N, channels, height,
    width), and returns logits: the experiment's pixel scaling is inside it, the names of the
    classes are in its metadata. It is read again and checked against the model on test images.
    Classes and scaling are those that the run recorded: its data need not be there any more.

    Examples:

      fedkn export runs/run-20261123-064512

      fedkn export runs/demo --cell kernel-b2-dirichlet0.3-s0 --to pt2 --output digits.pt2
    """
    from simulations.programs.program import write_program
    from simulations.programs.trained_model import load_trained_model
    from simulations.terminal import shown_steps, terminal

    trained = load_trained_model(folder, cell)
    card = trained.card
    path = output or folder / "cells" / card.cell / f"model.{to}"
    with shown_steps(terminal(stderr=True, quiet=as_json)) as step:
        written = write_program(trained, path, to.value, step)
    if as_json:
        shown = {
            "program": str(path),
            "bytes": written.size,
            "difference": written.difference,
            "test_images": 0 if written.why_drawn else written.images,
            "drawn_images": written.images if written.why_drawn else 0,
            "why_drawn": written.why_drawn,
            "same_class": written.same_class,
            "data": trained.data.identity,
            "data_recorded": trained.recorded,
            "damaged_checkpoints": trained.damaged,
            **asdict(card),
        }
        sys.stdout.write(json.dumps(shown) + "\n")
        return
    console = terminal()

    def say(name: str, text: str) -> None:
        console.print(f"{name + ':':<9}{text}", soft_wrap=True)

    say("Model", f"{card.cell}, round {card.round} of {trained.rounds}")
    for name in trained.damaged:
        say("Damaged", f"{name} was passed over for an older checkpoint")
    size = f"{card.channels}x{card.height}x{card.width}"
    say("Input", f"images: float32 (N, {size.replace('x', ', ')}), pixels from 0 to 255")
    say("Output", f"logits: float32 (N, {len(card.classes)}): {_listed(card.classes)}")
    say("Data", _data(trained, written))
    kind = "drawn images" if written.why_drawn else "test images"
    say(
        "Checked",
        f"differs from the model by at most {written.difference:.1e} of the largest logit; the "
        f"same class for {written.same_class} of {written.images} {kind}",
    )
    say("Program", f"{path} ({written.size / 1e6:.2f} MB)")


def _data(trained: TrainedModel, written: Written) -> str:
    if not trained.recorded:
        return (
            "this run recorded nothing of them: classes and scaling are those of the data as they "
            "are now, which may be others"
        )
    text = f"{trained.data.identity}, as the run recorded them"
    return f"{text}; {written.why_drawn}" if written.why_drawn else text


def _listed(classes: tuple[str, ...]) -> str:
    shown = ", ".join(printable(name, 60) for name in classes[:10])
    return shown if len(classes) <= 10 else f"{shown}, …"
