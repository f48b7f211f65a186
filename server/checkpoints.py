"""Checkpoints of a run: safetensors with a checksum, written atomically, the last few kept."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flwr
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedkn.config import ExperimentConfig, as_named_now
from fedkn.data.summary import DataSummary
from fedkn.errors import FedknError, UserError
from fedkn.files import write_atomically
from server.choice import Choice
from server.rounds.participation import Participation
from server.run_data import refuse_changes

__all__ = ["Checkpoint", "CheckpointNotWritten", "CheckpointStore", "weights_sha256"]

_LOG = logging.getLogger("flwr")
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")
_FIELDS = ("round", "names", "config", "versions", "token", "data", "choice")
_DEFAULTS = ExperimentConfig().flat()
_VERSIONS = {"torch": torch.__version__, "numpy": np.__version__, "flwr": flwr.__version__}


class CheckpointNotWritten(FedknError):
    """The disk takes no checkpoint: full, or not to be written; those before it are whole."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run after a round: all that the rest of the run depends on.

    Every random draw derives from the seed and the round, so there are no generators to keep.

    Attributes:
        round_: the round that made the tensors, from 1.
        tensors: the global tensors. strategy: the strategy's own arrays.
        participation: which states the clients are in; these stay with them.
        data: what was trained on; None in a checkpoint of an earlier fedkn, which did not say.
        choice: the best round so far, where validation images decide.
    """

    round_: int
    tensors: dict[str, np.ndarray]
    strategy: dict[str, np.ndarray]
    participation: Participation
    data: DataSummary | None = None
    choice: Choice | None = None

    @property
    def result(self) -> Mapping[str, np.ndarray]:
        """The global tensors of the best round where they are kept, else of this one."""
        return (self.choice and self.choice.tensors) or self.tensors

    @property
    def result_round(self) -> int:
        """The round that made them."""
        return self.choice.round_ if self.choice and self.choice.tensors else self.round_


class CheckpointStore:
    """The checkpoints of one cell, in its folder, and the configuration that they belong to.

    A checkpoint is written to a temporary file, flushed to the disk and renamed, so a kill at any
    moment leaves the one before it whole. A damaged one is named and the one before it is used.

    Args:
        folder: is made if it does not exist.
        keep: number of checkpoints kept.
        config: what the run computes, as dotted keys; a resume with another is refused.

    Raises:
        UserError: the folder was begun with another configuration, or is not one of ours.
        CheckpointNotWritten: the folder cannot be written.
    """

    def __init__(self, folder: Path, keep: int, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._keep = keep
        self._config = dict(config)
        path = folder / "config.json"
        if path.exists():
            self._refuse_other(_read_config(path))
        else:
            self._write("config.json", json.dumps(self._config, indent=1).encode())

    def save(self, checkpoint: Checkpoint) -> None:
        """Write `checkpoint`, then remove all but the newest ones.

        Raises:
            CheckpointNotWritten: no space, or no permission.
        """
        arrays = {f"model/{name}": value for name, value in checkpoint.tensors.items()}
        arrays |= {f"strategy/{name}": value for name, value in checkpoint.strategy.items()}
        if checkpoint.choice is not None:
            arrays |= {f"best/{name}": value for name, value in checkpoint.choice.tensors.items()}
        arrays["clients/last"] = checkpoint.participation.last
        contiguous = {name: np.asarray(value, order="C") for name, value in arrays.items()}
        metadata = {
            "round": str(checkpoint.round_),
            "names": json.dumps(list(arrays)),
            "config": json.dumps(self._config),
            "versions": json.dumps(_VERSIONS),
            "token": checkpoint.participation.token,
        }
        if checkpoint.data is not None:
            metadata["data"] = json.dumps(checkpoint.data.to_record())
        if checkpoint.choice is not None:
            metadata["choice"] = json.dumps(checkpoint.choice.to_record())
        metadata["sha256"] = _checksum(contiguous, metadata)
        # What a kill in the middle of writing left behind takes up space that is needed now.
        for leftover in self._folder.glob(".*.part"):
            leftover.unlink(missing_ok=True)
        self._write(f"checkpoint-{checkpoint.round_:06d}.safetensors", save(contiguous, metadata))
        for old in self._files()[self._keep :]:
            old.unlink(missing_ok=True)

    def load_newest(self, data: DataSummary | None = None) -> Checkpoint | None:
        """Return the newest good checkpoint, or None if there is none.

        Args:
            data: what is to be trained on from here; None: nothing, it is only looked at.

        Raises:
            UserError: it belongs to another configuration, or to other data.
        """
        for path in self._files():
            try:
                checkpoint, metadata = _read(path)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                _LOG.warning("checkpoint %s is damaged (%s): using the one before", path, error)
                continue
            self._refuse_other(json.loads(metadata["config"]))
            if data is not None and checkpoint.data is not None:
                refuse_changes(checkpoint.data, data, f"'{self._folder}'")
            elif data is not None:
                _LOG.warning("%s says nothing of its data: there is nothing to compare with", path)
            for name, version in json.loads(metadata["versions"]).items():
                if _VERSIONS.get(name) != version:
                    _LOG.warning(
                        "%s was written with %s %s, this is %s: the numbers may differ from those "
                        "of a run that was not stopped",
                        *(path, name, version, _VERSIONS.get(name)),
                    )
            return checkpoint
        return None

    def _files(self) -> list[Path]:
        """Return the checkpoints, newest first."""
        found = {path: _NAME.fullmatch(path.name) for path in self._folder.iterdir()}
        rounds = {path: int(match[1]) for path, match in found.items() if match}
        return sorted(rounds, key=lambda path: rounds[path], reverse=True)

    def _refuse_other(self, recorded: Mapping[str, Any]) -> None:
        # What there was no setting for was done as it is by default.
        then = {**_DEFAULTS, **as_named_now(recorded)}
        for key in sorted(self._config.keys() | as_named_now(recorded).keys()):
            if self._config.get(key) != then.get(key):
                raise UserError(
                    f"{self._folder} was begun with {key} = {then.get(key)!r}, not "
                    f"{self._config.get(key)!r}: resume with the same configuration, or give "
                    "another folder"
                )

    def _write(self, name: str, content: bytes) -> None:
        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            raise CheckpointNotWritten(
                f"cannot write {path} ({error.strerror or error}): what was written before is "
                "whole; free space or give another checkpoint.folder, and start again to resume"
            ) from error


def weights_sha256(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of named arrays: their names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}\x1f{value.dtype.str}\x1f{value.shape}\x1f".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): it tells which configuration the checkpoints beside "
            "it belong to; give another folder"
        ) from None


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    fields = (f"{key}={metadata[key]}" for key in _FIELDS if key in metadata)
    return hashlib.sha256("\x1f".join([weights_sha256(arrays), *fields]).encode()).hexdigest()


def _read(path: Path) -> tuple[Checkpoint, dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        metadata: dict[str, str] = file.metadata() or {}
        # The file is sorted by dtype and name; the order of the model's state is in the metadata.
        arrays = {name: file.get_tensor(name) for name in json.loads(metadata["names"])}
    if _checksum(arrays, metadata) != metadata["sha256"]:
        raise ValueError("its checksum does not match")
    parts: dict[str, dict[str, np.ndarray]] = {
        "model": {},
        "strategy": {},
        "clients": {},
        "best": {},
    }
    for name, value in arrays.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    participation = Participation(metadata["token"], parts["clients"]["last"])
    data = DataSummary.from_record(json.loads(metadata["data"])) if "data" in metadata else None
    choice = None
    if "choice" in metadata:
        choice = Choice.from_record(json.loads(metadata["choice"]), parts["best"])
    checkpoint = Checkpoint(
        int(metadata["round"]), parts["model"], parts["strategy"], participation, data, choice
    )
    return checkpoint, metadata
