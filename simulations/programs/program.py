"""Programs: a trained model in a file that needs no fedkn to run, written, checked and loaded."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedkn.data.optional import require
from fedkn.errors import FedknError, UserError, unknown_name
from fedkn.models.export import Format, Say, export, require_packages
from simulations.programs.classifier import Card, Classifier
from simulations.programs.trained_model import TrainedModel

__all__ = ["ENDINGS", "Written", "load_program", "write_program"]

ENDINGS: tuple[str, ...] = (".onnx", ".pt2")
_KEY = "fedkn"
_EXTRA = "fedkn.json"
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Written:
    """A program that was written: its size in bytes, and how its outputs were checked.

    Attributes:
        difference: the largest difference of a logit from the model's own, relative to the largest
            logit. images: number of images it was measured on, random inputs aside.
        same_class: on so many of them program and model name the same class.
        why_drawn: why the images were drawn and are no test images of the run; empty if they are.
    """

    path: Path
    size: int
    difference: float
    images: int
    same_class: int
    why_drawn: str


def write_program(
    trained: TrainedModel, path: Path, to: Format, say: Say = lambda step: None
) -> Written:
    """Write `trained` to `path`, its pixel scaling in front of it, its card in the metadata.

    The program takes float32 (N, C, H, W) of pixels, 0 to 255, called "images", and returns
    "logits". It is read again by `load_program` and run on random inputs and on test images, or on
    images drawn like them where the run's data are gone or changed; it appears under `path` only if
    no logit differs by more than 1e-4 of the largest. Each step is told to `say` when it begins.

    Raises UserError for a format or path that cannot be, or a missing package; FedknError if the
    outputs differ.
    """
    if to not in _FORMATS:
        raise unknown_name("export format", to, _FORMATS)
    if path.suffix != f".{to}":
        raise UserError(f"--output {path}: the name must end in .{to}, as --to {to} says")
    if not path.parent.is_dir():
        raise UserError(f"cannot write '{path}': folder '{path.parent}' does not exist")
    if path.is_dir():
        raise UserError(f"cannot write '{path}': it is a folder")
    require_packages(to)
    say("running the model on images")
    some = trained.some_images()
    own = trained.classifier.logits(some.images)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            draft = Path(folder) / path.name
            # Noise of pixels' range, and no image of the data: a pt2 file keeps its example.
            generator = torch.Generator().manual_seed(0)
            example = 255.0 * torch.rand(2, *some.images.shape[1:], generator=generator)
            difference = export(trained.network, example, draft, to, say)
            say("reading the program again and running it on images")
            _FORMATS[to].attach(draft, trained.card)
            theirs = load_program(draft).logits(some.images)
            scale = max(1.0, own.abs().max().item())
            difference = max(difference, (theirs - own).abs().max().item() / scale)
            if not difference <= _TOLERANCE:
                raise FedknError(
                    f"on images the {to} file's outputs differ from the model's by "
                    f"{difference:.1e} (allowed {_TOLERANCE:.0e}), so it was not written: please "
                    "report this"
                )
            same = int((theirs.argmax(1) == own.argmax(1)).sum())
            size = draft.stat().st_size
            draft.replace(path)
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from None
    return Written(path, size, difference, len(own), same, some.why_drawn)


def load_program(path: Path) -> Classifier:
    """Return the classifier in `path`, a file that `write_program` wrote.

    A pt2 file may hold pickled objects, which run code when they are loaded: load only those whose
    origin you trust. An ONNX file is data.

    Raises UserError for a file that is missing, damaged, or has no card; or a missing package.
    """
    if path.suffix not in ENDINGS:
        raise UserError(f"'{path}' is no program: its name must end in {' or '.join(ENDINGS)}")
    if not path.is_file():
        raise UserError(f"no program '{path}': there is no such file")
    run, text = _FORMATS[path.suffix[1:]].load(path)
    try:
        card = Card.from_json(text)
    except (ValueError, TypeError):
        raise UserError(
            f"'{path}' does not say what its classes are: it was not made by this fedkn's export"
        ) from None
    return Classifier(card, run)


Run = Callable[[Tensor], Tensor]


def _attach_onnx(path: Path, card: Card) -> None:
    onnx = require("onnx", "onnx", "export")
    program = onnx.load(path)
    # The exporter's notes: paths of this machine among them, and half of a small file's size.
    for node in program.graph.node:
        del node.metadata_props[:]
    onnx.helper.set_model_props(program, {_KEY: card.to_json()})
    onnx.save(program, path)


def _load_onnx(path: Path) -> tuple[Run, str]:
    runtime = require("onnxruntime", "onnxruntime", "export")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # Its exceptions have no common base but Exception.
    except Exception as error:
        raise _damaged(path, error) from None

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": pixels.numpy()})[0])

    return run, session.get_modelmeta().custom_metadata_map.get(_KEY, "")


def _attach_pt2(path: Path, card: Card) -> None:
    program = torch.export.load(path)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, path, extra_files={_EXTRA: card.to_json()})


def _load_pt2(path: Path) -> tuple[Run, str]:
    extra = {_EXTRA: ""}
    disabled = logging.root.manager.disable
    # Of a file that cannot be read torch.export logs whole tracebacks.
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(path, extra_files=extra).module()
    # Damaged bytes raise anything, from zip errors to AssertionError.
    except Exception as error:
        raise _damaged(path, error) from None
    finally:
        logging.disable(disabled)

    def run(pixels: Tensor) -> Tensor:
        logits: Tensor = module(pixels)
        return logits

    return run, extra[_EXTRA]


def _damaged(path: Path, error: Exception) -> UserError:
    lines = str(error).splitlines() or [type(error).__name__]
    return UserError(f"'{path}' is damaged or is no program: {lines[0]}")


@dataclass(frozen=True)
class _FileFormat:
    attach: Callable[[Path, Card], None]
    load: Callable[[Path], tuple[Run, str]]


_FORMATS = {
    "onnx": _FileFormat(_attach_onnx, _load_onnx),
    "pt2": _FileFormat(_attach_pt2, _load_pt2),
}
