"""The user's own code that a run needs: found by what the configuration names, for the bundle.

A package or a module is taken with those beside it that it imports. What is installed from a
package index is not taken: devices install that themselves, as they installed torch.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.references import Kind, module_of
from fedkn.text import printable

__all__ = ["NOTHING", "OwnCode", "own_code"]


@dataclass(frozen=True)
class OwnCode:
    """Files of the user's own, by their names in the bundle, and what devices must have installed.

    Attributes:
        files: Python alone. installed: top-level packages that come from a package index.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    installed: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """Yield in sentences what every device will run, and what it must have."""
        tops: dict[str, list[Path]] = {}
        for name, path in self.files.items():
            tops.setdefault(name.partition("/")[0], []).append(path)
        for top, paths in sorted(tops.items()):
            size = sum(path.stat().st_size for path in paths)
            count = f"{len(paths)} file{'s' * (len(paths) > 1)}"
            yield f"every device runs your {printable(top, 80)} ({count}, {size / 1000:.1f} kB)"
        for name in self.installed:
            yield f"devices need {printable(name, 80)} installed: the bundle does not carry it"


NOTHING = OwnCode()


def own_code(config: ExperimentConfig) -> OwnCode:
    """Return the user's own code that the parts which `config` names are in.

    Raises:
        UserError: there is no such module, or its package is too large to send to devices.
    """
    flat = config.flat()
    wanted = [
        (kind, str(flat[key]), module)
        for key, kind in _PARTS.items()
        if key in flat and (module := module_of(kind, str(flat[key])))
    ]
    files: dict[str, Path] = {}
    installed: set[str] = set()
    for kind, name, module in wanted:
        top = module.partition(".")[0]
        if top in _OURS:
            continue
        if find_spec(top) is None:
            raise UserError(
                f"{kind} '{printable(name, 120)}': there is no module '{printable(top, 80)}' here: "
                "start fedkn in the folder that has it, or install its package (pip install -e .)"
            )
        _take(top, files, installed)
    size = sum(path.stat().st_size for path in files.values())
    if len(files) > _MOST_FILES or size > _MOST_BYTES:
        raise UserError(
            f"your code is {len(files)} files of {size:,} bytes, more than a bundle should carry "
            f"to devices ({_MOST_FILES} files, {_MOST_BYTES:,} bytes): move what the run needs "
            "into a package of its own"
        )
    return OwnCode(files, tuple(sorted(installed)))


_PARTS: Mapping[str, Kind] = {
    "model.name": "model",
    "data.source": "source",
    "task.name": "task",
    "normalizer.name": "normalizer",
    "strategy.name": "strategy",
}
_OURS = {"fedkn", "clients", "server", "simulations"}
_MOST_FILES = 500
_MOST_BYTES = 2_000_000


def _take(top: str, files: dict[str, Path], installed: set[str]) -> None:
    """Add the files of the top-level module `top`, and of those beside it that it imports."""
    spec = None if top in _OURS or top in sys.stdlib_module_names else find_spec(top)
    if spec is None:
        return
    if _from_an_index(top):
        installed.add(top)
        return
    if spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations)))
        found = {f"{top}/{path.relative_to(folder).as_posix()}": path for path in _python(folder)}
        beside = folder.parent
    elif spec.origin and spec.origin.endswith(".py"):
        found = {f"{top}.py": Path(spec.origin)}
        beside = Path(spec.origin).parent
    else:
        raise UserError(f"module '{printable(top, 80)}' is no Python source: it cannot be sent")
    new = {name: path for name, path in found.items() if name not in files}
    files |= new
    if len(files) > _MOST_FILES:
        return
    for path in new.values():
        for name in sorted(_imported(path)):
            if (beside / f"{name}.py").is_file() or (beside / name).is_dir():
                _take(name, files, installed)
            elif name not in _REQUIRED and find_spec(name) is not None and _from_an_index(name):
                installed.add(name)


# What fedkn itself needs is on every device.
_REQUIRED = {"torch", "numpy", "flwr", "pydantic", "safetensors", "PIL"}


def _python(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if not any(part.startswith(".") or part == "__pycache__" for part in parts):
            yield path


def _imported(path: Path) -> set[str]:
    """Return the top-level modules that the file `path` imports anywhere."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return set()  # importing it says what is wrong
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - _OURS - sys.stdlib_module_names


def _from_an_index(top: str) -> bool:
    """Whether `top` was installed from a package index, not from a folder, file or repository."""
    names = packages_distributions().get(top, [])
    return any(_is_from_an_index(distribution(name)) for name in names)


def _is_from_an_index(found: Distribution) -> bool:
    return found.read_text("direct_url.json") is None
