import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedkn.errors import UserError
from simulations.partition_view import partition_table, save_picture
from simulations.runs.records import EXAMPLES, PartitionRecord

RECORD = PartitionRecord("shards of 1, 3 clients", 4, ["cat", "dog"], [[9, 0], [0, 30], [1, 2]])


def test_table_holds_every_count_and_the_sums() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(partition_table(RECORD))
    lines = console.export_text().splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert cells == [
        ["0", "9", "·", "9"],
        ["1", "·", "30", "30"],
        ["2", "1", "2", "3"],
        ["all", "10", "32", "42"],
    ]
    assert "shards of 1, 3 clients, seed 4" in " ".join(line.strip() for line in lines[:2])


def test_picture_is_darkest_where_most_images_are(tmp_path: Path) -> None:
    save_picture([RECORD, RECORD], tmp_path / "p.png")
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int)
    # A shade of blue, darker and more saturated the more images: two pictures, two darkest areas.
    darkest = (pixels[..., 2] - pixels[..., 0] > 60) & (pixels.sum(axis=2) < 200)
    upper, lower = np.array_split(darkest, 2)
    assert upper.sum() > 100
    assert lower.sum() > 100


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_other_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p.{suffix}"
    save_picture([RECORD], path)
    assert path.read_bytes()[:5] in (b"<?xml", b"%PDF-")


def test_a_picture_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        save_picture([RECORD], tmp_path / "missing" / "p.png")


def test_names_of_classes_are_plain_text(tmp_path: Path) -> None:
    names = ["$\\frac{", "[/red] :smile:", "a\n\x1b[2J", "$x$"]
    record = PartitionRecord("iid", 0, names, [[1, 2, 3, 4]])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(partition_table(record))
    header = console.export_text().splitlines()[2]
    assert [cell.strip() for cell in header.split("┃")[2:6]] == [
        "$\\frac{",
        "[/red] :smile:",
        "a \\x1b[2J",
        "$x$",
    ]
    with mpl.rc_context({"text.usetex": True}):
        save_picture([record], tmp_path / "p.svg")
    assert "$" in (tmp_path / "p.svg").read_text()


def test_whose_examples_a_client_has_stands_beside_it(tmp_path: Path) -> None:
    record = PartitionRecord(
        "natural, 2 clients", 0, ["cat", "dog"], [[1, 2], [3, 4]], names=["[b]ann", "bob\x1b"]
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(partition_table(record))
    text = console.export_text()
    assert "│ 0 │ [b]ann" in " ".join(text.split())
    assert "│ 1 │ bob\\x1b" in " ".join(text.split())
    save_picture([record], tmp_path / "p.svg")
    assert "bob" in (tmp_path / "p.svg").read_text()


def test_examples_without_classes_are_counted_by_client_alone() -> None:
    record = PartitionRecord("iid, 2 clients", 0, [EXAMPLES], [[5], [7]])
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(partition_table(record))
    lines = console.export_text().splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert cells == [["0", "5"], ["1", "7"], ["all", "12"]]
    assert "label" not in lines[0]
