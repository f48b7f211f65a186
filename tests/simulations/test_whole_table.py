"""Tables on terminals of any width: every number whole, every text there."""

import io
import re
from pathlib import Path

import pytest
from rich import box
from rich.console import Console

from simulations.partition_view import partition_table
from simulations.runs.records import PartitionRecord
from simulations.whole_table import WholeTable

_ROOT = Path(__file__).parents[2]
_COUNTS = [[1708 + 97 * client + 3 * label for label in range(10)] for client in range(3)]


def _shown(table: WholeTable, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def _numbers(lines: list[str]) -> list[str]:
    return [number for line in lines for number in re.findall(r"\d+", line)]


@pytest.mark.parametrize("width", [24, 40, 79, 80, 100, 300])
@pytest.mark.parametrize("names", [None, ["a hospital with a long name", "b", "c"]])
def test_a_partition_keeps_every_digit(width: int, names: list[str] | None) -> None:
    classes = [f"class-{'abcdefghij'[label]}" for label in range(10)]
    record = PartitionRecord("iid", 0, classes, _COUNTS, **({"names": names} if names else {}))
    lines = _shown(partition_table(record), width)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    found = _numbers(lines)
    for row in _COUNTS:
        assert {str(count) for count in (*row, sum(row))} <= {*found}
    assert str(sum(map(sum, _COUNTS))) in found
    assert sum(line.startswith("┏") for line in lines) == 1 or width < 300


@pytest.mark.parametrize("style", [None, box.SIMPLE_HEAD])
def test_texts_give_way_before_numbers(style: box.Box | None) -> None:
    table = WholeTable(title="a title", caption="a caption", box=style, padding=(0, 1, 0, 0))
    table.add_column("what")
    for heading in ("one", "two", "three"):
        table.add_column(heading, justify="right")
    text = "words and words, /a/path/without/a/single/space/in/all/of/it"
    table.add_row(text, "123456789", "98.76% ± 1.23", "1.5 GB")
    wide, narrow, least = (_shown(table, width) for width in (120, 50, 22))
    assert any(text in line and line.rstrip().endswith("1.5 GB") for line in wide)
    for lines, width in ((narrow, 50), (least, 22)):
        assert max(map(len, lines)) <= width
        whole = "".join("".join(lines).split())
        assert "123456789" in whole
        assert "98.76%" in whole
        assert "…" not in whole
        assert [line.strip() for line in lines if "a title" in line] == ["a title"]
        assert [line.strip() for line in lines if "a caption" in line] == ["a caption"]
    assert sum("one" in line for line in narrow) == 1


def test_a_table_without_columns_or_rows_is_none() -> None:
    assert _shown(WholeTable(), 80) in ([], [""])
    empty = WholeTable("a", "b")
    assert any("a" in line and "b" in line for line in _shown(empty, 80))


def test_no_table_of_the_command_line_is_another() -> None:
    """Rich's own leave characters out of numbers where a terminal is narrow."""
    users = [
        path.name
        for folder in ("simulations", "server", "clients", "fedkn")
        for path in (_ROOT / folder).rglob("*.py")
        if re.search(r"(?<!\w)Table\(", path.read_text(encoding="utf-8"))
    ]
    assert users == []
