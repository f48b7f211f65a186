"""What a client keeps of itself between rounds: tensors that never leave it.

Every round that a client trains in leaves one version. The server says which of them it wants to go
on from: the one of the last update that it accepted. So a refused update, a server that resumes
from a checkpoint and a client that restarts all find the state that belongs to them. What must not
be taken back, the privacy spent, is not among it (`clients.privacy_account`).
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.federation import arrays_to_tensors, tensors_to_arrays
from fedkn.files import write_atomically

__all__ = ["STATE_FOLDER", "LocalState", "folder_in_run", "local_state"]

_LOG = logging.getLogger("flwr")

STATE_FOLDER = "state-folder"
"""Key of the node's config that names the folder where its client's state is kept on disk."""

_RUNS_KEPT = 3
"""Runs of which a client keeps its state on disk."""


def folder_in_run(config: ExperimentConfig) -> str:
    """Return where a simulation keeps its clients' state: beside the run's checkpoints, if any."""
    if not config.checkpoint.folder:
        return ""
    return str(Path(config.checkpoint.folder) / "cells" / config.checkpoint.cell / "clients")


def local_state(context: Context, partition: int, run: str) -> LocalState:
    """Return the state of client `partition` in `run`: on disk if the node's config names a
    ``state-folder``, else in the memory of the node, where it is lost when the node ends.

    Raises:
        UserError: the run's token is no plain name.
    """
    if not re.fullmatch(r"[0-9a-f]{8,64}", run):
        raise UserError(f"the server's message has no usable run token: '{run}'")
    folder = context.node_config.get(STATE_FOLDER)
    if isinstance(folder, str) and folder:
        return _OnDisk(Path(folder) / f"client-{partition}" / run)
    return _InMemory(context, run)


class LocalState(ABC):
    """The versions of one client's state in one run, by the round that left them."""

    def restore(self, round_: int) -> tuple[dict[str, Tensor], bool]:
        """Return what round `round_` left (nothing for 0), and whether that is lost.

        A version that is missing or damaged is lost: the client starts anew.
        """
        if not round_:
            return {}, False
        tensors = self._read(round_)
        return (tensors, False) if tensors is not None else ({}, True)

    def keep(self, round_: int, tensors: Mapping[str, Tensor], *, horizon: int) -> None:
        """Keep `tensors` as what `round_` left.

        Versions of later rounds belong to a future that was taken back; of those older than
        `horizon` rounds only the newest is kept.
        """
        self._write(round_, tensors)
        rounds = self._rounds()
        old = [number for number in rounds if number <= round_ - horizon]
        for number in [*old[:-1], *(number for number in rounds if number > round_)]:
            self._remove(number)

    @abstractmethod
    def _rounds(self) -> list[int]:
        """Return the rounds of which there are versions, ascending."""

    @abstractmethod
    def _read(self, round_: int) -> dict[str, Tensor] | None: ...

    @abstractmethod
    def _write(self, round_: int, tensors: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def _remove(self, round_: int) -> None: ...


class _OnDisk(LocalState):
    """One file a version, written whole: safetensors, and the SHA-256 of all before it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _rounds(self) -> list[int]:
        names = (_FILE.fullmatch(path.name) for path in self._folder.glob("round-*"))
        return sorted(int(match[1]) for match in names if match)

    def _read(self, round_: int) -> dict[str, Tensor] | None:
        path = self._path(round_)
        try:
            whole = path.read_bytes()
            content, digest = whole[:-_DIGEST_BYTES], whole[-_DIGEST_BYTES:]
            if hashlib.sha256(content).digest() != digest:
                raise ValueError("its checksum does not match")
            return dict(load(content))
        except FileNotFoundError:
            _LOG.warning("no %s: this client starts anew", path)
        except (OSError, ValueError, SafetensorError) as error:
            _LOG.warning("%s is damaged (%s): this client starts anew", path, error)
        return None

    def _write(self, round_: int, tensors: Mapping[str, Tensor]) -> None:
        if not self._folder.exists():
            self._folder.mkdir(parents=True)
            self._forget_old_runs()
        content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        write_atomically(self._path(round_), content + hashlib.sha256(content).digest())

    def _remove(self, round_: int) -> None:
        self._path(round_).unlink(missing_ok=True)

    def _path(self, round_: int) -> Path:
        return self._folder / f"round-{round_:06d}.safetensors"

    def _forget_old_runs(self) -> None:
        runs = sorted(self._folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in runs[:-_RUNS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


class _InMemory(LocalState):
    """One ArrayRecord a version, in the context that Flower keeps for the node."""

    def __init__(self, context: Context, run: str) -> None:
        self._records = context.state.array_records
        self._prefix = f"{run}/"

    def _rounds(self) -> list[int]:
        own = (name for name in self._records if name.startswith(self._prefix))
        return sorted(int(name.removeprefix(self._prefix)) for name in own)

    def _read(self, round_: int) -> dict[str, Tensor] | None:
        record = self._records.get(f"{self._prefix}{round_}")
        if record is None:
            _LOG.warning("what round %d left is gone: this client starts anew", round_)
            return None
        return arrays_to_tensors(record)

    def _write(self, round_: int, tensors: Mapping[str, Tensor]) -> None:
        for name in [name for name in self._records if not name.startswith(self._prefix)]:
            del self._records[name]
        self._records[f"{self._prefix}{round_}"] = tensors_to_arrays(tensors)

    def _remove(self, round_: int) -> None:
        del self._records[f"{self._prefix}{round_}"]


_DIGEST_BYTES = hashlib.sha256().digest_size
_FILE = re.compile(r"round-(\d+)\.safetensors")
