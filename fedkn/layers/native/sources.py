"""The C++ sources of the fused CPU kernels, by name.

They are the files beside this module. Flower bundles Python files alone, so that a node that has
its code from a bundle reads the same text from `fedkn.layers.native.bundled`, which

    python -m fedkn.layers.native

writes anew from the files: to be run after every change to them. A test holds the two equal.
"""

from __future__ import annotations

from pathlib import Path

from fedkn.layers.native import bundled

__all__ = ["MAIN", "files", "sources"]

MAIN = "operators.cpp"
"""The file to compile: it includes the others."""


def sources() -> dict[str, str]:
    """Return the text of every source by its name, sorted: the files', else the bundled ones."""
    return files() or bundled.sources()


def files() -> dict[str, str]:
    """Return the text of the files beside this module, like `sources`; nothing in a bundle."""
    folder = Path(__file__).parent
    paths = sorted([*folder.glob("*.h"), *folder.glob("*.cpp")], key=lambda path: path.name)
    return {path.name: path.read_text(encoding="utf-8") for path in paths}
