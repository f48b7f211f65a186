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
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, RecordDict
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedkn.config import ExperimentConfig
from fedkn.data.fingerprint import Fingerprint
from fedkn.errors import UserError
from fedkn.federation import arrays_to_tensors, tensors_to_arrays
from fedkn.files import write_atomically
from fedkn.stack import Flat, Layout
from fedkn.training.transfer import moved

__all__ = ["STATE_FOLDER", "Kept", "LocalState", "Room", "folder_in_run", "local_state"]

_LOG = logging.getLogger("flwr")

STATE_FOLDER = "state-folder"
"""Key of the node's config that names the folder where its client's state is kept on disk."""

_RUNS_KEPT = 3
"""Runs of which a client keeps its state on disk."""


class Room:
    """How many bytes clients of a process may keep where they need not: on a device, or twice."""

    def __init__(self, most: int = 1 << 28) -> None:
        self.left = most


class Kept(RecordDict):
    """A client's state in an engine on this machine, which need not be written down.

    Attributes:
        versions: what the client keeps, tensors end to end, by run and the round that left them.
            Where there is a state folder they are in it too, and here is at most the last one.
    """

    def __init__(self, room: Room) -> None:
        """`room`: what all clients of the process have."""
        super().__init__()
        self.versions: dict[tuple[str, int], Flat] = {}
        self._room = room
        self._taken: dict[tuple[str, int], int] = {}

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.versions) or len(self) > 0

    def put(self, run: str, round_: int, tensors: Mapping[str, Tensor], *, only: bool) -> None:
        """Keep a copy of `tensors` on their device.

        If there is no room, and they are kept `only` here, on the host; else not at all.
        """
        self.drop(run, round_)
        flat = Flat.of(_layout(tuple((n, t.shape, t.dtype) for n, t in tensors.items())), tensors)
        assert flat is not None
        size = sum(part.nbytes for part in flat.parts)
        away = any(part.device.type != "cpu" for part in flat.parts)
        if away or not only:
            if size <= self._room.left:
                self._room.left -= size
                self._taken[run, round_] = size
            elif only:
                flat = flat.to(torch.device("cpu"))
            else:
                return
        self.versions[run, round_] = flat

    def drop(self, run: str, round_: int) -> None:
        """Forget a version, if it is here."""
        self.versions.pop((run, round_), None)
        self._room.left += self._taken.pop((run, round_), 0)


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
    kept = context.state if isinstance(context.state, Kept) else None
    if isinstance(folder, str) and folder:
        return _OnDisk(Path(folder) / f"client-{partition}" / run, kept)
    return _InMemory(context, run) if kept is None else _AsTensors(kept, context, run)


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
    def first_data(self, now: Fingerprint) -> Fingerprint:
        """Return the fingerprint of the images that this client first trained on in this run.

        The first time it is `now`, which is kept; so it is where nothing can be read or kept.
        """

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
    """One file a version, written whole: safetensors, and the SHA-256 of all before it.

    In an engine, which has a `kept`, the last one is there too, and files are on the disk once the
    engine has seen to it (`fedkn.files.make_durable`), for all clients of a round at once.
    """

    def __init__(self, folder: Path, kept: Kept | None) -> None:
        self._folder = folder
        self._kept = kept

    def first_data(self, now: Fingerprint) -> Fingerprint:
        path = self._folder / _DATA
        try:
            if path.exists():
                return Fingerprint.from_json(path.read_text(encoding="utf-8"))
            self._make_folder()
            write_atomically(path, now.to_json().encode())
        except (OSError, ValueError, RecursionError) as error:
            _LOG.warning("%s: %s: a change of this device's data goes unseen", path, error)
        return now

    def _rounds(self) -> list[int]:
        names = (_FILE.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def _read(self, round_: int) -> dict[str, Tensor] | None:
        if self._kept and (flat := self._kept.versions.get((self._folder.name, round_))):
            return flat.tensors()
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
        self._make_folder()
        here = moved(tensors, torch.device("cpu"))
        content = save({name: value.contiguous() for name, value in here.items()})
        whole = content + hashlib.sha256(content).digest()
        write_atomically(self._path(round_), whole, durable=self._kept is None)
        if self._kept is not None:
            for run, last in list(self._kept.versions):
                self._kept.drop(run, last)
            self._kept.put(self._folder.name, round_, tensors, only=False)

    def _remove(self, round_: int) -> None:
        if self._kept is not None:
            self._kept.drop(self._folder.name, round_)
        self._path(round_).unlink(missing_ok=True)

    def _path(self, round_: int) -> Path:
        return self._folder / f"round-{round_:06d}.safetensors"

    def _make_folder(self) -> None:
        if not self._folder.exists():
            self._folder.mkdir(parents=True)
            self._forget_old_runs()

    def _forget_old_runs(self) -> None:
        runs = sorted(self._folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in runs[:-_RUNS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)


class _InMemory(LocalState):
    """One ArrayRecord a version, in the context that Flower keeps for the node."""

    def __init__(self, context: Context, run: str) -> None:
        self._state = context.state
        self._records = context.state.array_records
        self._run = run
        self._prefix = f"{run}/"

    def first_data(self, now: Fingerprint) -> Fingerprint:
        kept = self._state.config_records.get(_DATA, ConfigRecord()).get(self._run)
        if isinstance(kept, str):
            return Fingerprint.from_json(kept)
        self._state[_DATA] = ConfigRecord({self._run: now.to_json()})
        return now

    def _rounds(self) -> list[int]:
        own = (name for name in self._records if name.startswith(self._prefix))
        return sorted(int(name.removeprefix(self._prefix)) for name in own)

    def _read(self, round_: int) -> dict[str, Tensor] | None:
        record = self._records.get(f"{self._prefix}{round_}")
        if record is None:
            self._say_gone(round_)
            return None
        return arrays_to_tensors(record)

    def _say_gone(self, round_: int) -> None:
        _LOG.warning("what round %d left is gone: this client starts anew", round_)

    def _write(self, round_: int, tensors: Mapping[str, Tensor]) -> None:
        for name in [name for name in self._records if not name.startswith(self._prefix)]:
            del self._records[name]
        self._records[f"{self._prefix}{round_}"] = tensors_to_arrays(tensors)

    def _remove(self, round_: int) -> None:
        del self._records[f"{self._prefix}{round_}"]


class _AsTensors(_InMemory):
    """Tensors as they are, in what an engine keeps for the client."""

    def __init__(self, kept: Kept, context: Context, run: str) -> None:
        super().__init__(context, run)
        self._kept = kept

    def _rounds(self) -> list[int]:
        return sorted(round_ for run, round_ in self._kept.versions if run == self._run)

    def _read(self, round_: int) -> dict[str, Tensor] | None:
        flat = self._kept.versions.get((self._run, round_))
        if flat is None:
            self._say_gone(round_)
            return None
        return flat.tensors()

    def _write(self, round_: int, tensors: Mapping[str, Tensor]) -> None:
        for run, old in [key for key in self._kept.versions if key[0] != self._run]:
            self._kept.drop(run, old)
        self._kept.put(self._run, round_, tensors, only=True)

    def _remove(self, round_: int) -> None:
        self._kept.drop(self._run, round_)


@lru_cache(maxsize=8)
def _layout(tensors: tuple[tuple[str, torch.Size, torch.dtype], ...]) -> Layout:
    # One for all clients that keep the same.
    return Layout({n: torch.empty(shape, dtype=t, device="meta") for n, shape, t in tensors})


_DIGEST_BYTES = hashlib.sha256().digest_size
_DATA = "data"
"""Name of the file, or the record, of the first images' fingerprint."""

_FILE = re.compile(r"round-(\d+)\.safetensors")
