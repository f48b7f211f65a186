"""`export`: a trained model as a file that runs without fedkn, checked against the model."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedkn.data.optional import require
from fedkn.errors import FedknError, UserError, unknown_name
from fedkn.layers.kernel.definition import without_autocast_regions
from fedkn.models.copying import copied
from fedkn.text import printable

__all__ = ["Format", "Say", "export", "require_packages"]

Format = Literal["onnx", "pt2"]

Say = Callable[[str], None]

# Outputs may differ by the rounding of float32, summed over the depth of the network.
_TOLERANCE = 1e-4
_CHECKED_BATCHES = (1, 3)


def export(
    model: nn.Module,
    example_input: Tensor,
    path: str | Path,
    to: Format = "onnx",
    say: Say = lambda step: None,
) -> float:
    """Write `model`, in evaluation mode, to `path`; return by how much its outputs differ.

    `to` is "onnx" (any ONNX runtime) or "pt2" (``torch.export.load``). The batch may have any
    size; channels, height and width are those of `example_input` (N, C, H, W). The file is loaded
    again and run on batches of 1 and 3, noise with the mean and the deviation of `example_input`;
    the largest difference from the model's own outputs, relative to their largest, is returned. It
    appears under `path` only if that is within 1e-4. Each step, of which some take minutes for a
    network of many layers, is told to `say` when it begins.

    Raises UserError for an unknown format, a path that cannot be written, a missing package, a
    model whose evaluation is random, or one that this torch cannot convert to ONNX, as those with
    BatchNorm in torch 2.6; FedknError if the file's outputs differ.
    """
    if to not in get_args(Format):
        raise unknown_name("export format", to, get_args(Format))
    write, load = _FORMATS[to]
    target = Path(path)
    if not target.parent.is_dir():
        raise UserError(f"cannot write '{target}': folder '{target.parent}' does not exist")
    if any(getattr(module, "eval_mode", None) == "stochastic" for module in model.modules()):
        raise UserError(
            "eval_mode='stochastic' makes each evaluation another: build the model with 'expected'"
        )
    # On the CPU, so that the file runs on machines without the accelerator.
    frozen = copied(model).cpu().eval()
    example = _at_least_two(example_input.detach().cpu())
    try:
        with torch.no_grad():
            once, again = frozen(example), frozen(example)
    except RuntimeError as error:
        shape = tuple(example_input.shape)
        raise UserError(f"the model does not take images of shape {shape}: {error}") from None
    if not torch.equal(once.nan_to_num(), again.nan_to_num()):
        raise UserError(
            "the model gives another output each time, also in evaluation: take out what draws "
            "random numbers there (dropout that stays on, noise) before exporting"
        )
    with _folder_beside(target) as folder:
        draft = folder / f"model.{to}"
        with _quiet(), torch.no_grad():
            write(frozen, example, draft, say)
        say("comparing the program's outputs with the model's")
        difference = _difference(frozen, load(draft), example)
        if not difference <= _TOLERANCE:
            raise FedknError(
                f"the {to} file's outputs differ from the model's by {difference:.1e} "
                f"(allowed {_TOLERANCE:.0e}), so it was not written: please report this"
            )
        draft.replace(target)
    return difference


Run = Callable[[Tensor], Tensor]


def _at_least_two(example: Tensor) -> Tensor:
    # From a batch of one, torch.export concludes that the batch is always one.
    return example if len(example) > 1 else torch.cat([example, example])


def require_packages(to: Format) -> None:
    """Raise UserError where a package is missing that a program of format `to` is written with."""
    for package in ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ():
        require(package, package, "export")


def _difference(model: nn.Module, run: Run, example: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    # Of the images' own range: others may be next to constant for the model, whose normalizers
    # then show nothing but how either side rounds.
    spread, middle, worst = example.std().item() or 1.0, example.mean().item(), 0.0
    for size in _CHECKED_BATCHES:
        x = torch.randn(size, *example.shape[1:], generator=generator, dtype=example.dtype)
        x = x * spread + middle
        with torch.no_grad():
            expected = model(x)
        scale = max(1.0, expected.abs().max().item())
        worst = max(worst, (run(x) - expected).abs().max().item() / scale)
    return worst


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-")
    except OSError as error:
        raise UserError(f"cannot write '{target}': {error.strerror}") from None
    with folder as name:
        yield Path(name)


def _write_pt2(model: nn.Module, example: Tensor, path: Path, say: Say) -> None:
    say(_RECORDING)
    torch.export.save(_program(model, example), path)


def _load_pt2(path: Path) -> Run:
    module = torch.export.load(path).module()

    def run(x: Tensor) -> Tensor:
        out: Tensor = module(x)
        return out

    return run


def _write_onnx(model: nn.Module, example: Tensor, path: Path, say: Say) -> None:
    require_packages("onnx")
    try:
        say(_RECORDING)
        with without_autocast_regions():
            recorded = _program(model, example)
        say("converting it to ONNX")
        program = torch.onnx.export(
            recorded,
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
            optimize=False,
        )
        assert program is not None
        say("simplifying the program")
        program.optimize()
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = printable((str(cause).strip().splitlines() or [type(cause).__name__])[0], 300)
        raise UserError(
            f"torch {torch.__version__} cannot convert this model to ONNX ({reason}): take a newer "
            "torch, or export to pt2"
        ) from error
    program.save(path)


def _load_onnx(path: Path) -> Run:
    runtime = require("onnxruntime", "onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors: what it could not simplify runs all the same
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return run


def _program(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    # Torch 2.6 needs both said: among batches of any size it finds the number that marks a slice's
    # end, and its strict mode, the default then, knows less of Python.
    batch = torch.export.Dim("batch", min=1, max=2**31 - 1)
    return torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks, which no user can act on, off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


_RECORDING = "recording what the model computes"
_FORMATS: dict[
    str, tuple[Callable[[nn.Module, Tensor, Path, Say], None], Callable[[Path], Run]]
] = {
    "onnx": (_write_onnx, _load_onnx),
    "pt2": (_write_pt2, _load_pt2),
}
