"""The trained global model of a run folder, ready to be exported or to predict with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkn import __version__
from fedkn.algorithms import federation_rule
from fedkn.config import ExperimentConfig
from fedkn.data.summary import DataSummary
from fedkn.errors import UserError, unknown_name
from fedkn.experiment import (
    build_model,
    data_summary,
    federated_data,
    inputs_of,
    normalizer_of,
)
from fedkn.federation import on_the_wire
from fedkn.normalizers import TensorRole
from fedkn.seeds import torch_generator
from fedkn.text import printable
from server.checkpoints import Checkpoint, CheckpointStore, weights_sha256
from simulations.programs.classifier import Card, Classifier, FromPixels
from simulations.runs.flower_runs import open_run
from simulations.runs.folder import RunFolder
from simulations.runs.records import CellRecord

__all__ = ["SomeImages", "TrainedModel", "load_trained_model", "trained_network"]

_IMAGES = 256
_OWN = "take the weights themselves, from Python by fedkn.load(…).model()"


@dataclass(frozen=True, eq=False)
class SomeImages:
    """Images to try a model on: uint8 (N, C, H, W).

    `why_drawn` says why they are no test images of the run; empty if they are.
    """

    images: Tensor
    why_drawn: str


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A cell's global model on the CPU, in evaluation mode.

    Attributes:
        network: float32 pixels (N, C, H, W) in [0, 255] to logits.
        config: the experiment's. card: what is known of it.
        data: what it was trained on. recorded: whether the run says so itself; else `data` are
            those of today, which may be others.
        rounds: rounds that the experiment has. damaged: newer checkpoints that were passed over.
    """

    network: nn.Module
    config: ExperimentConfig
    card: Card
    data: DataSummary
    recorded: bool
    rounds: int
    damaged: tuple[str, ...]

    @property
    def classifier(self) -> Classifier:
        """The network as a classifier."""
        return Classifier(self.card, self.network)

    def some_images(self) -> SomeImages:
        """Return up to 256 test images; images drawn like the run's where its data are not there.

        The drawn ones have the shape, mean and deviation of the run's training images.
        """
        if why := self._why_not_its_data():
            return SomeImages(_drawn(self.data), why)
        test = federated_data(self.config).test
        # Spread over the test images, which may be sorted by class.
        some = np.unique(np.linspace(0, len(test) - 1, _IMAGES).astype(np.int64))
        return SomeImages(test.select(some).inputs, "")

    def _why_not_its_data(self) -> str:
        try:
            found = self.data.changes(data_summary(self.config))
        except UserError as error:
            return f"the run's data are not there: {error}"
        return f"the data changed since the run: {'; '.join(found)}" if found else ""


def _check_classifies(record: CellRecord) -> None:
    name = record.config.task.name
    if name != "classification":
        raise UserError(
            f"cell '{record.id}' was trained for the task '{printable(name, 60)}', and programs "
            f"are for classification: {_OWN}"
        )


def load_trained_model(path: Path, cell: str | None) -> TrainedModel:
    """Return the model of the newest good checkpoint of `cell` in the run folder `path`.

    Without `cell` it is that of the one result cell that is finished. The classes, the size of
    images and the scaling are those that the run recorded: its data need not be there. Only a
    checkpoint of an earlier fedkn says nothing of them; then they come from the data.

    Raises UserError where the folder is not a run's, the cell is unknown or must be chosen, it does
    not classify images, there is no good checkpoint, it does not fit the model, or the data are
    needed and missing.
    """
    record = _chosen(open_run(path), cell)
    _check_classifies(record)
    checkpoint, damaged = _checkpoint(path / "cells" / record.id)
    # The exported program and the check of it are for the CPU, whatever trained the model. Nothing
    # is downloaded for the check alone.
    config = record.config.overlay(device="cpu", data__download=False)
    data = checkpoint.data or data_summary(config)
    network = _network(config, data, checkpoint)
    if len(data.shape) != 3 or data.dtype != "uint8":
        raise UserError(
            f"'{path}' was trained on {data.inputs}, and programs are for images of uint8 pixels: "
            f"{_OWN}"
        )
    channels, height, width = data.shape
    inputs = inputs_of(config, torch.device("cpu"), data)
    program = FromPixels.of(network, inputs, channels)
    card = Card(
        classes=data.classes,
        channels=channels,
        height=height,
        width=width,
        scaling=inputs.scaling,
        mean=_numbers(program.mean),
        deviation=_numbers(program.deviation),
        run=path.resolve().name,
        cell=record.id,
        round=checkpoint.result_round,
        weights_sha256=weights_sha256(checkpoint.result),
        model=config.model.name,
        normalizer=config.normalizer.name,
        fedkn=__version__,
    )
    return TrainedModel(
        program.eval(),
        config,
        card,
        data,
        recorded=checkpoint.data is not None,
        rounds=config.rounds,
        damaged=damaged,
    )


def trained_network(path: Path, cell: str | None) -> nn.Module:
    """Return the network of the newest good checkpoint of `cell` in the run folder `path`.

    It is on the CPU, in evaluation mode. Cells are chosen, and errors raised, as by
    `load_trained_model`.
    """
    record = _chosen(open_run(path), cell)
    checkpoint, _ = _checkpoint(path / "cells" / record.id)
    config = record.config.overlay(device="cpu", data__download=False)
    return _network(config, checkpoint.data or data_summary(config), checkpoint).eval()


def _chosen(run: RunFolder, cell: str | None) -> CellRecord:
    records = {record.id: record for record in run.cells()}
    if not records:
        raise UserError(f"no cell of the run '{run.path}' has started: nothing is trained yet")
    if cell is not None:
        if cell not in records:
            raise unknown_name("cell", cell, records)
        return records[cell]
    finished = [
        record
        for record in records.values()
        if record.purpose == "result" and record.status == "completed"
    ]
    if len(finished) == 1:
        return finished[0]
    if finished:
        raise UserError(
            f"'{run.path}' has {len(finished)} finished cells: choose one by --cell, of "
            + ", ".join(record.id for record in finished)
        )
    raise UserError(
        f"no result cell of '{run.path}' is finished: go on with 'fedkn resume {run.path}', or "
        f"choose one as it is by --cell, of {', '.join(records)}"
    )


def _checkpoint(folder: Path) -> tuple[Checkpoint, tuple[str, ...]]:
    files = sorted(folder.glob("checkpoint-*.safetensors"), reverse=True)
    if not files:
        raise UserError(f"cell '{folder.name}' has no checkpoint yet in {folder}")
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}, which belongs to the checkpoints: {error}") from None
    checkpoint = CheckpointStore(folder, len(files), config).load_newest()
    if checkpoint is None:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"every checkpoint of cell '{folder.name}' is damaged ({names}): run it again"
        )
    used = f"checkpoint-{checkpoint.round_:06d}.safetensors"
    return checkpoint, tuple(file.name for file in files if file.name > used)


def _network(config: ExperimentConfig, data: DataSummary, checkpoint: Checkpoint) -> nn.Module:
    network = build_model(config, data)
    normalizer = normalizer_of(config)
    rule = federation_rule(config, normalizer, network)
    local = [name for name, role in rule.items() if role is TensorRole.LOCAL]
    if local:
        normalizers_own = normalizer.federation_rule(network)[local[0]] is TensorRole.LOCAL
        keeper = (
            f"normalizer '{config.normalizer.name}'"
            if normalizers_own
            else f"strategy '{config.strategy.name}'"
        )
        raise UserError(
            f"with {keeper} each client keeps tensors of its own "
            f"({local[0]}, …), so the global model alone is not a trained one"
        )
    state = network.state_dict()
    expected = {name: tuple(state[name].shape) for name in on_the_wire(rule)}
    found = {name: value.shape for name, value in checkpoint.result.items()}
    if found != expected:
        odd = sorted(dict(set(found.items()) ^ set(expected.items())))
        raise UserError(
            f"the checkpoint of cell '{config.checkpoint.cell}' does not fit its model "
            f"({', '.join(odd[:3])}): it was written by another fedkn"
        )
    loaded = {name: torch.from_numpy(value) for name, value in checkpoint.result.items()}
    network.load_state_dict(state | loaded)
    return network


def _drawn(data: DataSummary) -> Tensor:
    """Return smooth uint8 images of the data's shape, mean and deviation, the same every time."""
    channels, height, width = data.shape
    generator = torch_generator("images to check a program on")
    coarse = torch.randn(_IMAGES, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    noise = torch.randn(_IMAGES, channels, height, width, generator=generator)
    pattern = (smooth + 0.3 * noise) / (smooth + 0.3 * noise).std()
    # Where the scaling needed no figures none are known: the middle of the pixels' range.
    mean, deviation = (
        torch.tensor(figures or [usual] * channels).view(-1, 1, 1)
        for figures, usual in ((data.mean, 0.5), (data.deviation, 0.25))
    )
    return (255 * (mean + deviation * pattern)).round().clamp(0, 255).to(torch.uint8)


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.flatten().tolist())
