"""What lies in a folder of images: its classes, its files, and what is passed over."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fedkn.data.decoding import EXTENSIONS
from fedkn.errors import UserError
from fedkn.text import printable

__all__ = ["ImageFile", "Layout", "image_files", "read_client_layout", "read_layout"]

_ENDINGS = tuple(sorted(EXTENSIONS))
_KINDS = f"(looked for {', '.join(_ENDINGS)})"
# What operating systems and storage boxes leave behind, beside all that begins with a dot. In lower
# case.
_LEFT_BEHIND = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
        *("__macosx", "lost+found", "@eadir", "$recycle.bin", "system volume information"),
        *("#recycle", "@recycle", "#snapshot", "@recently-snapshot", "@sharebin"),
        *("network trash folder", "temporary items"),
    }
)
_PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
}
_NAMED = 10


class ImageFile(NamedTuple):
    """A file with an ending of image files. `size` and `modified` are -1 where it is not there."""

    path: str
    label: int
    size: int
    modified: int
    client: int = 0


@dataclass(frozen=True)
class Layout:
    """The files of a folder of images.

    Attributes
    ----------
    classes
        Names of the class folders, sorted. Bytes that are no UTF-8 are written as ``\\xNN``.
    train, test
        Sorted by class and path. `test` is None where no part of the folder is set apart for tests.
    notes
        What was passed over, in sentences.
    clients
        Names of the clients' folders, sorted; empty where there are none.
    """

    classes: tuple[str, ...]
    train: list[ImageFile]
    test: list[ImageFile] | None
    notes: tuple[str, ...]
    clients: tuple[str, ...] = ()


def read_layout(root: Path) -> Layout:
    """Return what lies in `root`: ``<class>/*``, or ``train/<class>/*`` and ``test/<class>/*``.

    The two parts may be spelt in capitals, and ``training`` and ``testing``; ``val`` (``valid``,
    ``validation``) is taken for a missing ``test`` and passed over beside one. A folder called
    train without folders in it is a class, if there are others. Hidden files and folders, and those
    that operating systems leave behind, are as if they were not there.

    Raises
    ------
    UserError
        Not at least two classes, no images, files but no images in a class, classes of test that
        train lacks, or no part for tests beside train.
    OSError
        A folder cannot be read.
    """
    passed = _Passed()
    parts = _parts(root)
    if "train" not in parts:
        folders = _class_folders(root)
        passed.beside(root, set(folders.values()))
        return Layout(tuple(folders), _files(root, folders, passed), None, passed.notes())
    train = parts["train"]
    test = parts.get("test") or parts.get("val")
    if test is None:
        raise UserError(
            f"{printable(root)} has {train}/ but no test/: add test/ with the same classes, or set "
            f"data.root (--root) to {printable(root / train)} to hold out a part of it"
        )
    if "test" not in parts:
        passed.say(f"the test images are those of {test}/, because there is no test/")
    elif "val" in parts:
        passed.say(
            f"{parts['val']}/ is not used: validation images are set aside from {train}/ "
            "(data.validation_fraction)"
        )
    passed.beside(root, set(parts.values()))
    folders = _class_folders(root / train)
    theirs = _subfolders(root / test)
    if strange := [name for name in theirs if name not in folders]:
        raise UserError(
            f"{printable(root / test)} has classes that {printable(root / train)} lacks: "
            f"{_named(strange)}"
        )
    passed.beside(root / train, set(folders.values()))
    passed.beside(root / test, set(theirs.values()))
    in_order = {name: theirs.get(name, "") for name in folders}
    return Layout(
        tuple(folders),
        _files(root / train, folders, passed),
        _files(root / test, in_order, passed),
        passed.notes(),
    )


def read_client_layout(root: Path) -> Layout:
    """Return what lies in `root`: ``<client>/<class>/*``.

    The classes are those of all clients, sorted; a client may lack some. A client without an image
    is named in the notes. What is passed over is what `read_layout` passes over.

    Raises
    ------
    UserError
        No folders of clients, images where folders of classes should be, not at least two classes,
        or no images.
    OSError
        A folder cannot be read.
    """
    passed = _Passed()
    clients = _subfolders(root)
    own = {client: _subfolders(root / folder) for client, folder in clients.items()}
    classes = sorted({name for names in own.values() for name in names})
    if not clients or len(classes) < 2:
        raise UserError(
            f"{printable(root)} must hold ROOT/<client>/<class>/*, of two classes or more; it has "
            f"{len(clients)} folders with {len(classes)} class folders in them (ROOT/<class>/* and "
            "ROOT/train/<class>/* are data.source = 'image_folder')"
        )
    if {_part(name) for name in clients} <= {*_PARTS}:
        raise UserError(
            f"{printable(root)} has the parts {_named([*clients])}, not clients: set data.source = "
            "'image_folder', or data.root to the folder of the clients"
        )
    passed.beside(root, {*clients.values()}, "client")
    files: list[ImageFile] = []
    empty = []
    for number, (client, folder) in enumerate(clients.items()):
        loose = [entry.name for entry in _entries(root / folder) if _is_image(entry.name)]
        if loose and not own[client]:
            raise UserError(
                f"{printable(root / folder)} holds images (such as {printable(loose[0])}) but no "
                "class folders: put them into ROOT/<client>/<class>/"
            )
        passed.beside(root / folder, {*own[client].values()})
        in_order = {name: own[client].get(name, "") for name in classes}
        found = _of_classes(root / folder, in_order, passed)
        if not found:
            empty.append(client)
        files += [file._replace(client=number) for file in found]
    if not files:
        raise UserError(f"no images in the class folders of {printable(root)} {_KINDS}")
    if empty:
        passed.say(f"{len(empty)} of {len(clients)} clients without an image: {_named(empty)}")
    return Layout(tuple(classes), files, None, passed.notes(), tuple(clients))


def image_files(folder: Path | str) -> list[str]:
    """Return the paths in `folder`, at any depth, that end as image files do, sorted.

    Hidden files and what operating systems leave behind are passed over; links to folders are not
    followed. Raises OSError where a folder cannot be read.
    """
    return sorted(entry.path for entry in _walk(folder) if _is_image(entry.name))


class _Passed:
    """Collects what is passed over."""

    def __init__(self) -> None:
        self._sentences: list[str] = []
        self._endings: Counter[str] = Counter()

    def say(self, sentence: str) -> None:
        self._sentences.append(sentence)

    def beside(self, folder: Path, used: set[str], kind: str = "class") -> None:
        """Note what lies in `folder` beside the folders that are `used`."""
        others = sorted(entry.name for entry in _entries(folder) if entry.name not in used)
        if strange := [name for name in others if _is_image(name) or (folder / name).is_dir()]:
            self.say(
                f"not read, because it belongs to no {kind} of {printable(folder)}: "
                f"{_named(strange)}"
            )

    def foreign(self, entry: os.DirEntry[str]) -> None:
        """Note a file in a class folder that does not end as images do."""
        self._endings[Path(entry.name).suffix.lower() or "no ending"] += 1

    def notes(self) -> tuple[str, ...]:
        if not self._endings:
            return tuple(self._sentences)
        kinds = ", ".join(f"{printable(e, 20)}: {n}" for e, n in self._endings.most_common(_NAMED))
        total = self._endings.total()
        files = f"{total} file{'s' if total > 1 else ''} in class folders"
        return (*self._sentences, f"{files} not read, because no image ends like this ({kinds})")


def _parts(root: Path) -> dict[str, str]:
    """Return the names of the folders that are parts: train, test, val."""
    found: dict[str, str] = {}
    folders = [entry for entry in _entries(root) if entry.is_dir()]
    parts = {entry.name: _part(entry.name) for entry in folders}
    for entry in sorted(folders, key=lambda entry: entry.name):
        part = parts[entry.name]
        if part is None or (None in parts.values() and not _subfolders(entry)):
            continue
        if part in found:
            raise UserError(
                f"{printable(root)} has both {found[part]}/ and {entry.name}/: "
                "put their files together, or rename one"
            )
        found[part] = entry.name
    return found


def _part(name: str) -> str | None:
    return next((part for part, names in _PARTS.items() if name.lower() in names), None)


def _class_folders(folder: Path) -> dict[str, str]:
    classes = _subfolders(folder)
    if len(classes) < 2:
        found = f"only '{printable(next(iter(classes)))}'" if classes else "none"
        raise UserError(
            f"{printable(folder)} must hold one folder for each class, at least two; it has "
            f"{found}: set data.root (--root) to a folder laid out as ROOT/<class>/* or "
            "ROOT/train/<class>/*"
        )
    return classes


def _subfolders(folder: Path | os.DirEntry[str]) -> dict[str, str]:
    """Return the names of classes, sorted, with those of their folders."""
    names = sorted(entry.name for entry in _entries(folder) if entry.is_dir())
    classes: dict[str, str] = {}
    for name in names:
        # Classes have to be text that can be written and sent; names of files may be any bytes.
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")
        if shown in classes:
            raise UserError(
                f"{printable(os.fspath(folder))} has two folders that both read "
                f"'{printable(shown)}': rename the one whose name is no UTF-8"
            )
        classes[shown] = name
    return classes


def _files(folder: Path, classes: dict[str, str], passed: _Passed) -> list[ImageFile]:
    files = _of_classes(folder, classes, passed)
    if not files:
        raise UserError(f"no images in the class folders of {printable(folder)} {_KINDS}")
    return files


def _of_classes(folder: Path, classes: dict[str, str], passed: _Passed) -> list[ImageFile]:
    files: list[ImageFile] = []
    for label, name in enumerate(classes.values()):
        if not name:
            continue
        own = []
        foreign = 0
        for entry in _walk(folder / name):
            if _is_image(entry.name):
                own.append(_image_file(entry.path, label))
            else:
                foreign += 1
                passed.foreign(entry)
        if foreign and not own:
            raise UserError(
                f"class folder {printable(folder / name)} holds files but no images {_KINDS}"
            )
        files += sorted(own)
    return files


def _image_file(path: str, label: int) -> ImageFile:
    try:
        found = Path(path).stat()
    except OSError:
        # A link to nowhere, or to itself: named among the files that cannot be used.
        return ImageFile(path, label, -1, -1)
    size = found.st_size if stat.S_ISREG(found.st_mode) else -1
    return ImageFile(path, label, size, found.st_mtime_ns)


def _walk(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """Yield all that is not a folder, at any depth."""
    waiting: list[Path | str] = [folder]
    while waiting:
        for entry in _entries(waiting.pop()):
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            else:
                yield entry


def _entries(folder: Path | str | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [
            entry
            for entry in entries
            if not entry.name.startswith(".") and entry.name.lower() not in _LEFT_BEHIND
        ]


def _is_image(name: str) -> bool:
    return name.lower().endswith(_ENDINGS)


def _named(names: list[str]) -> str:
    more = len(names) - _NAMED
    shown = ", ".join(printable(name, 60) for name in names[:_NAMED])
    return shown + (f", and {more} more" if more > 0 else "")
