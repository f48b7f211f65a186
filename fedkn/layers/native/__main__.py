"""``python -m fedkn.layers.native`` writes `bundled` anew, from the C++ files beside it."""

from __future__ import annotations

from pathlib import Path

from fedkn.files import write_atomically
from fedkn.layers.native import bundled
from fedkn.layers.native.sources import files

__all__ = ["python_module"]


def python_module(texts: dict[str, str]) -> str:
    """Return the text of `fedkn.layers.native.bundled` that holds `texts`, sources by name."""
    table = "".join(f"{bundled.HEADING}{name}\n{text}" for name, text in texts.items())
    assert "\\" not in table, "Python would read a backslash as its own"
    assert '"""' not in table, "this would end the table"
    before, mark, _ = Path(bundled.__file__).read_text(encoding="utf-8").partition(_MARK)
    return f'{before}{mark}\n{table}"""\n'


_MARK = '\n_TABLE = """'

if __name__ == "__main__":
    write_atomically(Path(bundled.__file__), python_module(files()).encode())
