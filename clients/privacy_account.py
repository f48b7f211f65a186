"""What differential privacy a client's images have spent: an account that only ever grows.

It is not part of the versions of `clients.local_state`, which a server takes back by asking for an
older one: what has left the device cannot be taken back. An update is entered before it is sent,
whatever becomes of it: refused, late, lost, or forgotten by a server that resumes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import ConfigRecord, Context

from clients.local_state import STATE_FOLDER
from fedkn.errors import UserError
from fedkn.files import write_atomically
from fedkn.training.privacy_spent import PrivacySpent

__all__ = ["PrivacyAccount", "account_in", "privacy_account"]

_LOG = logging.getLogger("flwr")


def privacy_account(context: Context, partition: int) -> PrivacyAccount:
    """Return the account of client `partition`: on disk if the node's config names a
    ``state-folder``, else in the memory of the node, where it is lost when the node ends.
    """
    folder = context.node_config.get(STATE_FOLDER)
    if isinstance(folder, str) and folder:
        return account_in(Path(folder), partition)
    return _InMemory(context)


def account_in(state_folder: Path, partition: int) -> PrivacyAccount:
    """Return the account of client `partition` that is kept in `state_folder`."""
    return _OnDisk(state_folder / f"privacy-account-{partition}.json")


@dataclass(frozen=True)
class _OfRun:
    """What one run has cost: its steps, the last round, and digests of its newest updates."""

    spent: PrivacySpent = field(default_factory=PrivacySpent)
    last_round: int = 0
    sent: tuple[str, ...] = ()


_Entries = Mapping[str, _OfRun]


class PrivacyAccount(ABC):
    """The account of one client, for all the runs that it took part in."""

    def spent(self, run: str, accepted: int) -> PrivacySpent:
        """Return what the updates of `run` have cost so far.

        Args:
            accepted: the round of the last update that the server accepted from this client (0:
                none), which the account must know.

        Raises:
            UserError: the account is damaged, or lacks what the server knows.
        """
        entries, problem = self._known()
        of = entries.get(run, _OfRun())
        if not problem and of.last_round < accepted:
            known = f"ends with round {of.last_round}" if of.last_round else "has no entry"
            problem = f"{known} of this run, and the server has an update of round {accepted}"
        if problem:
            with self._locked():
                self._agree_to_begin_anew(problem)
                self._write(_text({**entries, run: replace(of, last_round=accepted)}))
        return of.spent

    def lifetime(self) -> PrivacySpent:
        """Return what the updates of all runs have cost together.

        Raises:
            UserError: the account is damaged.
        """
        return _together(self._intact())

    def charge(
        self,
        run: str,
        round_: int,
        cost: PrivacySpent,
        update: bytes,
        *,
        allow: Callable[[PrivacySpent], None] | None = None,
    ) -> PrivacySpent:
        """Enter what an update that is about to be sent costs; return what `run` cost until now.

        An update that was sent before in this round, to the last bit, tells nothing new: with the
        noise of a seed a server that resumes is sent it again. It costs nothing. Any other costs,
        and is kept when this returns.

        Args:
            update: all bytes that the guarantee covers.
            allow: raises an error if what all runs will have cost is too much; then nothing is
                entered. Runs may be under way at once, in other processes.

        Raises:
            UserError: the account is damaged, or cannot be written: then nothing may be sent.
        """
        digest = hashlib.sha256(b"%d:" % round_ + update).hexdigest()
        with self._locked():
            entries = self._intact()
            of = entries.get(run, _OfRun())
            if digest in of.sent:
                return of.spent
            spent = of.spent.plus(cost)
            now = _OfRun(spent, max(of.last_round, round_), (*of.sent, digest)[-_SENT_KEPT:])
            others = {name: replace(other, sent=()) for name, other in entries.items()}
            following = {**others, run: now}
            if allow:
                allow(_together(following))
            self._write(_text(following))
        return spent

    def _known(self) -> tuple[_Entries, str]:
        """Return the entries, and what is wrong with them: then there are none."""
        try:
            return _entries_of(self._read()), ""
        except ValueError as error:
            return {}, f"is damaged ({error})"

    def _intact(self) -> _Entries:
        entries, problem = self._known()
        if problem:
            raise self._lost(problem)
        return entries

    @abstractmethod
    def _lost(self, problem: str) -> UserError:
        """Return the error that says what is wrong, and what the owner can do."""

    @abstractmethod
    def _locked(self) -> AbstractContextManager[None]:
        """Return the context in which no other process writes."""

    @abstractmethod
    def _agree_to_begin_anew(self, problem: str) -> None:
        """Return if the owner has decided that an account which is lost shall be begun anew.

        Raises:
            UserError: they have not.
        """

    @abstractmethod
    def _read(self) -> str:
        """Return what was written last; nothing if nothing was.

        Raises:
            ValueError: it is not as it was written.
        """

    @abstractmethod
    def _write(self, text: str) -> None: ...


_SENT_KEPT = 64
"""Updates of a run that are known again; an older one that is sent again costs once more."""


class _OnDisk(PrivacyAccount):
    """A file whose first line is the SHA-256 of the rest, written whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._decision = path.with_name(f"{path.name}.begin-anew")

    def _lost(self, problem: str) -> UserError:
        return UserError(
            f"the privacy account '{self._path}' {problem}: what this client's images have "
            "spent is unknown, so it does not train. Put the file back from a copy; or, if "
            "what was sent before shall not count, create an empty file "
            f"'{self._decision.name}' beside it"
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self._path.with_name(f".{self._path.name}.lock").open("w")
        except OSError as error:
            raise self._unwritable(error) from error
        with lock:
            # The lock goes with its process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _agree_to_begin_anew(self, problem: str) -> None:
        if not self._decision.is_file():
            raise self._lost(problem)
        _LOG.warning(
            "the privacy account '%s' %s: begun anew as its owner decided; epsilon leaves out "
            "what was sent before",
            self._path,
            problem,
        )
        try:
            if self._path.exists():
                self._path.replace(self._path.with_name(f"{self._path.name}.damaged"))
            self._decision.unlink()
        except OSError as error:
            raise UserError(f"cannot begin '{self._path}' anew: {error.strerror}") from error

    def _read(self) -> str:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise ValueError(error.strerror or str(error)) from error
        digest, _, rest = content.partition(b"\n")
        if digest != hashlib.sha256(rest).hexdigest().encode():
            raise ValueError("its checksum does not match")
        return rest.decode()

    def _write(self, text: str) -> None:
        content = text.encode()
        digest = hashlib.sha256(content).hexdigest().encode()
        try:
            write_atomically(self._path, digest + b"\n" + content, mode=0o600)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"the privacy account '{self._path}' cannot be written "
            f"({error.strerror or error}), so no update is sent: free space, or give the node "
            "another state-folder"
        )


class _InMemory(PrivacyAccount):
    """A record in the context that Flower keeps for the node."""

    def __init__(self, context: Context) -> None:
        self._records = context.state.config_records

    def _locked(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _agree_to_begin_anew(self, problem: str) -> None:
        raise self._lost(problem)

    def _lost(self, problem: str) -> UserError:
        return UserError(
            f"this client's privacy account {problem}: what its images have spent is unknown, so "
            "it trains no more in this run. It was in memory: give the node a state-folder"
        )

    def _read(self) -> str:
        return str(self._records.get(_RECORD, ConfigRecord()).get(_TEXT, ""))

    def _write(self, text: str) -> None:
        self._records[_RECORD] = ConfigRecord({_TEXT: text})


def _together(entries: _Entries) -> PrivacySpent:
    total = PrivacySpent()
    for of in entries.values():
        total = total.plus(of.spent)
    return total


_RECORD, _TEXT = "privacy-account", "text"


def _text(entries: _Entries) -> str:
    runs = {
        run: {"steps": of.spent.history, "last": of.last_round, "sent": of.sent}
        for run, of in entries.items()
    }
    return json.dumps({"format": _FORMAT, "runs": runs}, indent=1)


def _entries_of(text: str) -> _Entries:
    """Return what `_text` wrote. Raises ValueError for anything else."""
    if not text:
        return {}
    content = json.loads(text)
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"its format {content['format']} is not known here")
        return {str(run): _of_run(**entry) for run, entry in content["runs"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an account: {error!r}") from None


def _of_run(steps: list[tuple[float, float, int]], last: int, sent: list[str]) -> _OfRun:
    history = tuple((float(noise), float(rate), int(count)) for noise, rate, count in steps)
    return _OfRun(PrivacySpent(history), int(last), tuple(map(str, sent)))


_FORMAT = 1
