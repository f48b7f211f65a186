"""The documentation that repeats what the code says is held equal to it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from pydantic import BaseModel

import fedkn
from fedkn.config import ExperimentConfig
from fedkn.normalizers import table
from simulations.comparison.grid import CompareConfig
from simulations.overview.collection import collect
from simulations.overview.markdown import blocks, filled
from simulations.overview.page import overview

ROOT = Path(__file__).parents[1]


def _rows(section: type[BaseModel], prefix: str = "") -> list[str]:
    rows, tables = [], []
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            tables += ["", f"## [{name}]", "", (type(field.default).__doc__ or "").split("\n")[0]]
            tables += ["", "| key | default | |", "| --- | --- | --- |"]
            tables += _rows(type(field.default), f"{prefix}{name}.")
        else:
            shown = '""' if field.default == "" else field.default
            rows.append(f"| `{prefix}{name}` | `{shown}` | {field.description} |")
    return rows + tables


def _hold_equal(path: Path, text: str, expected: str) -> None:
    if os.environ.get("FEDKN_WRITE_DOCS"):
        path.write_text(expected, encoding="utf-8")
        return
    assert text == expected, f"docs/{path.name} is out of date: make docs"


def test_configuration_page_lists_every_key() -> None:
    path = ROOT / "docs" / "configuration.md"
    text = path.read_text(encoding="utf-8")
    marker = "<!-- keys -->\n"
    head = text[: text.index(marker) + len(marker)]
    lines = ["", "| key | default | |", "| --- | --- | --- |", *_rows(ExperimentConfig)]
    expected = head + "\n".join(lines) + "\n"
    _hold_equal(path, text, expected)


def test_compare_page_lists_every_key_of_compare() -> None:
    path = ROOT / "docs" / "compare.md"
    text = path.read_text(encoding="utf-8")
    start, end = "<!-- compare: make docs writes it -->\n", "<!-- end of compare -->\n"
    head, rest = text.split(start)
    rows = []
    for name, field in CompareConfig.model_fields.items():
        default = field.default
        if isinstance(default, tuple):
            shown = json.dumps(list(default))
        else:
            shown = '""' if default == "" else str(default)
        rows.append(f"| `compare.{name}` | `{shown}` | {field.description} |")
    lines = ["| key | default | |", "| --- | --- | --- |", *rows]
    table_ = "\n".join(lines)
    expected = f"{head}{start}\n{table_}\n\n{end}{rest.split(end)[1]}"
    _hold_equal(path, text, expected)


def test_normalizers_page_has_what_the_classes_declare() -> None:
    path = ROOT / "docs" / "normalizers.md"
    text = path.read_text(encoding="utf-8")
    start, end = "<!-- table: make docs writes it -->\n", "<!-- end of table -->\n"
    head, rest = text.split(start)
    expected = f"{head}{start}{table.markdown()}{end}{rest.split(end)[1]}"
    _hold_equal(path, text, expected)


def test_results_page_has_what_the_kept_runs_give(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / "docs" / "results.md"
    text = path.read_text(encoding="utf-8")
    kept = overview(collect(Path("docs/runs")))
    assert not kept.left_out, "docs/runs holds what cannot be read, or was run with other settings"
    _hold_equal(path, text, filled(text, blocks(kept)))


def test_the_page_of_the_public_names_has_them_all_and_no_other() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^### `fedkn\.(\w+)`$", text, re.MULTILINE)
    assert sorted(named) == sorted(fedkn.__all__)
    for name in fedkn.__all__:
        part = getattr(fedkn, name)
        if callable(part):
            assert ">>> " in (part.__doc__ or "") or name in ("Event", "convert"), name


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert len(pages) > 5
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.name} -> {target}")
    assert not broken


def test_every_test_that_a_page_names_exists():
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    sources = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    there = {*files, *(file.rpartition("/")[2] for file in files)}
    there |= set(re.findall(r"^ *def (test_\w+)\(", sources, re.MULTILINE))
    named = {
        (page.name, name)
        for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
        for code in re.findall(r"`([^`]+)`", page.read_text(encoding="utf-8"))
        for name in re.findall(r"(?:tests/[\w/]*)?\btest_\w+(?:\.py)?", code)
    }
    assert len(named) > 100
    # Entries of an .npz file, and a configuration key.
    others = {"test_images", "test_labels", "test_limit"}
    assert not {(page, name) for page, name in named if name not in there | others}
