"""docs/design.md is a map of the code as it is: its tree, its picture of a round and its table."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Return the text below a heading of the page, up to the next one."""
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def entries() -> list[str]:
    """Return the paths that the tree shows; a folder's ends with a slash."""
    (block,) = re.findall(r"```\n(.*?)```", section("The tree"), re.DOTALL)
    found: list[str] = []
    folders: list[str] = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        found.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return found


@pytest.mark.parametrize("path", entries())
def test_the_tree_shows_what_is_there(path):
    assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()


@pytest.mark.parametrize("package", ["fedkn", "clients", "server", "simulations"])
def test_the_tree_shows_all_that_is_at_the_top_of_a_package(package):
    there = {
        f"{path.relative_to(ROOT)}/" if path.is_dir() else str(path.relative_to(ROOT))
        for path in (ROOT / package).iterdir()
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.*")))
    }
    unnamed = {path for path in there if path.split("/")[1].startswith("__")}
    missing = there - unnamed - set(entries())
    assert not missing, f"not in the tree of docs/design.md: {sorted(missing)}"


def defined(path: Path) -> set[str]:
    """Return the names of a file's functions and classes, and ``Class.method``."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return names


CALLS = re.findall(r'\["([\w.]+)<br/>([\w/]+\.py)"\]', section("One round"))


def test_the_picture_of_a_round_shows_every_side_of_it():
    assert {path.split("/")[0] for _, path in CALLS} == {"server", "clients", "fedkn"}
    boxes = section("One round").count('["')
    titles = section("One round").count("subgraph ")
    assert len(CALLS) == boxes - titles > 15


@pytest.mark.parametrize(("name", "path"), CALLS, ids=[name for name, _ in CALLS])
def test_the_picture_of_a_round_shows_functions_where_they_are(name, path):
    assert name in defined(ROOT / path)


ROWS = [
    line.strip("| ").split(" | ", 1)
    for line in section("Where do I change …?").splitlines()
    if line.startswith("| ") and "---" not in line
][1:]


def test_the_table_of_changes_has_the_likely_ones():
    assert len(ROWS) >= 10
    assert len({what for what, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("what", "places"), ROWS, ids=[what for what, _ in ROWS])
def test_what_the_table_of_changes_names_is_there(what, places):
    paths = re.findall(r"`([\w/]+\.[\w.]+)`", places)
    files = [path for path in paths if "/" in path]
    assert files, f"{what}: no file"
    assert [path for path in files if not (ROOT / path).is_file()] == []


def test_every_path_on_the_page_leads_somewhere():
    paths = set(
        re.findall(r"`((?:fedkn|clients|server|simulations|tests|docs)/[\w./-]*\w)/?`", PAGE)
    )
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
