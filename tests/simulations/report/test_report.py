"""Reports of whole, partial and broken runs: complete, honest, self-contained, valid."""

import dataclasses
import html as html_
import io
import json
import math
import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from fedkn.errors import UserError
from fedkn.text import printable
from simulations.report import build_report, summary_dict, summary_table
from simulations.runs.folder import RunFolder
from tests.simulations.report.synthetic import Synthetic

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A strict reader: every element closed in order, ids unique, nothing fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.pictures: list[str] = []
        self.regions: list[tuple[str | None, str | None]] = []
        self.classes: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        of = dict(attrs)
        if of.get("role") == "img":
            self.pictures.append(of.get("aria-label") or "")
        if of.get("role") == "region":
            self.regions.append((of.get("tabindex"), of.get("aria-label")))
        self.classes.extend((of.get("class") or "").split())
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def printed(run: RunFolder) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary_table(run))
    return console.export_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = Synthetic(
        tmp_path_factory.mktemp("runs") / "full",
        normalizers=("kernel", "ws_group", "batch", "none"),
        batch_sizes=(1, 2),
        rates=(0.01, 0.05, 0.1),
    )
    run.write_extras()
    run.write_search()
    run.write_cells()
    return run.folder


@pytest.fixture(scope="module")
def html(full: RunFolder) -> str:
    return build_report(full).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_is_valid_and_needs_nothing_else(html: str, page: Page) -> None:
    assert max(page.ids.values()) == 1
    assert all(link.startswith(("#", "data:image/", "data:text/csv;")) for link in page.links)
    assert "<script" not in html
    assert not re.search(r"@import|url\((?!#)", html)
    for link in page.links:
        assert not link.startswith("#") or page.ids[link[1:]] == 1


def test_what_was_run_and_the_verdict_come_first(full: RunFolder, page: Page) -> None:
    verdict = summary_dict(full)["partitions"][0]["verdict"]
    body = page.text[page.text.index("full", page.text.index("fedkn")) :]
    facts = (
        "data digits task classification judged by accuracy, higher is better "
        "model resnet8 published width parameters 78,042 clients 20 dirichlet 0.3 "
        "cohort 5 a round rounds 12 of 1 local epoch seeds 5 0 to 4 engine auto"
    )
    assert body.startswith(f"full {facts} {verdict}")


def test_the_terminal_tells_the_same_facts_and_cuts_nothing_at_80_columns(tmp_path: Path) -> None:
    run = Synthetic(
        tmp_path / "r",
        normalizers=("kernel", "my_package.my_module:MyOwnNormalizer", "batch"),
        batch_sizes=(1, 2),
        seeds=2,
        partitions=({"scheme": "iid"}, {"alpha": 0.1, "clients": 300}),
        keepers=("batch",),
    )
    run.write_cells()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(run.folder))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    words = " ".join(" ".join(lines).split())
    assert "model resnet8 (published width) · parameters 78,042 · clients 20, 300" in words
    assert "iid, 20 clients: accuracy after the last round" in words
    (start, *_) = {line.index("normalizer") for line in lines if "normalizer" in line}
    names = "".join(line[start:].split(" ")[0] for line in lines if len(line) > start)
    assert "my_package.my_module:MyOwnNormalizer" in names


def test_figures_agree_with_the_raw_lines(full: RunFolder, page: Page) -> None:
    """Recomputed from metrics.jsonl with none of the report's own code."""
    final: dict[tuple[str, int], dict[int, float]] = {}
    lines = [json.loads(line) for line in full.metrics_path.read_text().splitlines()]
    configs = {line["cell"]: line["config"] for line in lines if line["kind"] == "start"}
    for line in lines:
        if line["kind"] == "evaluation" and line["split"] == "test" and line["round"] == 12:
            config = configs[line["cell"]]
            key = (config["normalizer.name"], config["train.batch_size"])
            final.setdefault(key, {})[config["seed"]] = line["accuracy"]
    section = summary_dict(full)["partitions"][0]
    entries = {(e["normalizer"], e["batch_size"]): e for e in section["entries"]}
    assert len(entries) == 8
    for key, by_seed in final.items():
        values = list(by_seed.values())
        assert entries[key]["accuracy"] == pytest.approx(np.mean(values))
        low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
        assert entries[key]["half_width"] == pytest.approx((high - low) / 2)
        assert f"{100 * np.mean(values):.1f}% ± {50 * (high - low):.1f}" in page.text
    (difference,) = [
        d
        for d in section["differences"]
        if d["batch_size"] == 2 and {d["ahead"], d["behind"]} == {"kernel", "ws_group"}
    ]
    pairs = [[final[name, 2][seed] for seed in range(5)] for name in ("kernel", "ws_group")]
    assert difference["p"] == pytest.approx(stats.ttest_rel(*pairs).pvalue)
    # Six pairs at batch size 2, three at batch size 1, where batch has no result.
    assert difference["p"] <= difference["p_holm"] <= 9 * difference["p"]


def test_untrainable_cells_are_named(full: RunFolder, page: Page) -> None:
    assert "batch has no result at batch size 1" in page.text
    losses = [row for row in page.rows if row[0] == "untrainable cells"]
    reason = "normalizer 'batch' needs a batch size of 2 or more"
    assert losses == [["untrainable cells", "batch", "1", "5 cells", reason]]
    assert "untrainable" in printed(full)
    entries = summary_dict(full)["partitions"][0]["entries"]
    without_engine = [(e["normalizer"], e["batch_size"]) for e in entries if e["engine"] is None]
    assert without_engine == [("batch", 1)]


def test_the_search_is_shown_with_the_rate_that_was_chosen(html: str, page: Page) -> None:
    assert len(re.findall(r'class="chosen">[\d.]+%<', html)) == 4 * 2
    header = next(row for row in page.rows if "0.01" in row)
    assert header == ["normalizer", "0.01", "0.05", "0.1", ""]
    assert "at the edge" not in page.text


def test_a_rate_at_the_edge_of_those_tried_is_warned_of(tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("kernel",), batch_sizes=(2,), rates=(0.05, 0.1))
    run.write_search()
    run.write_cells()
    assert "at the edge of the rates tried" in read(build_report(run.folder)).text


def test_groups_stand_beside_the_name(full: RunFolder, tmp_path: Path) -> None:
    assert "ws_group (≤ 8 groups)" in printed(full)
    run = Synthetic(
        tmp_path / "r", normalizers=("group",), batch_sizes=(2,), **{"normalizer.groups": 4}
    )
    run.write_cells()
    assert "group (4 groups)" in read(build_report(run.folder)).text


def test_an_all_clear_only_where_nothing_was_lost(page: Page, tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("kernel",), batch_sizes=(2,))
    run.write_cells()
    assert "Nothing was dropped" in read(build_report(run.folder)).text
    assert "Nothing was dropped" not in page.text


def test_every_loss_is_reported_with_its_reason(tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("kernel", "group"), batch_sizes=(2,), seeds=3)
    run.cell("kernel", 2, 0, refused=[{"client": 3, "reason": "holds <NaN>"}], updates=4)
    run.cell("kernel", 2, 1, failed=[{"client": 7, "reason": "out of memory"}], updates=3)
    run.cell("group", 2, 0, skipped_batches=2, skipped_examples=3, train_loss=math.nan)
    run.cell("group", 2, 1, until=4, end={"status": "failed", "error": "no valid update"})
    with run.folder.metrics_path.open("a") as file:
        file.write('{"cell": "x", "kind": "rou\n')
    page = read(build_report(run.folder))
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 5}
    assert rows["refused updates"][:2] == ["kernel", "2"]
    assert rows["refused updates"][3] == "holds <NaN>"
    assert rows["failed clients"][2:] == ["1 time (client 7)", "out of memory"]
    assert rows["unanswered requests"][2] == "1 update"
    assert rows["skipped batches"][2].startswith("2 batches")
    assert rows["failed cells"][2:] == ["1 cell", "no valid update"]
    assert rows["unreadable lines"][2] == "1 line"
    assert any("no number" in what for what in rows)
    assert "Partial: 4 of 6 result cells have ended." in page.text


def test_failed_cells_count_as_not_reaching_the_target(tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("kernel",), batch_sizes=(2,), seeds=2)
    run.cell("kernel", 2, 0)
    run.cell("kernel", 2, 1, until=1, end={"status": "failed", "error": "diverged"})
    (entry,) = summary_dict(run.folder)["partitions"][0]["entries"]
    assert (entry["reached_target"], entry["rounds_to_target"]) == (1, None)
    assert (entry["seeds"], entry["lost"]) == (1, 1)
    assert "leaves out 1 cell" in summary_dict(run.folder)["partitions"][0]["verdict"]


def test_a_run_cut_at_any_line_still_gives_a_report_that_says_so(tmp_path: Path) -> None:
    run = Synthetic(
        tmp_path / "r", normalizers=("kernel", "none"), batch_sizes=(2,), seeds=1, rounds=2
    )
    run.write_extras()
    run.write_cells()
    lines = run.folder.metrics_path.read_bytes().splitlines(keepends=True)
    for cut in range(0, len(lines), 3):
        run.folder.metrics_path.write_bytes(b"".join(lines[:cut]) + b'{"cell": "resu')
        assert "Partial:" in read(build_report(run.folder)).text
        assert summary_dict(run.folder)["complete"] is False
        json.dumps(summary_dict(run.folder), allow_nan=False)
        printed(run.folder)


@pytest.mark.parametrize("extras", [False, True])
def test_an_empty_run(tmp_path: Path, extras: bool) -> None:
    run = Synthetic(tmp_path / "r", seeds=2)
    if extras:
        run.write_extras()
    page = read(build_report(run.folder))
    assert "nothing to compare" in page.text
    assert "Partial: 0 of 42 result cells" in page.text
    json.dumps(summary_dict(run.folder), allow_nan=False)
    assert "Partial" in printed(run.folder)


def test_one_seed_claims_no_difference(tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("kernel", "none"), batch_sizes=(2,), seeds=1)
    run.write_cells()
    page = read(build_report(run.folder))
    assert "no difference from it can be shown" in page.text
    assert "No test was possible" in page.text
    assert "±" not in printed(run.folder)


def test_nan_accuracy_is_no_result(tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("kernel",), batch_sizes=(2,), seeds=1)
    run.cell("kernel", 2, 0, train_loss=None)
    text = run.folder.metrics_path.read_text()
    last = re.search(r'"round": 12, "split": "test", .*"accuracy": [\d.]+', text)
    assert last
    run.folder.metrics_path.write_text(text.replace(last[0], last[0].rsplit(" ", 1)[0] + " NaN"))
    (entry,) = summary_dict(run.folder)["partitions"][0]["entries"]
    assert (entry["accuracy"], entry["seeds"], entry["lost"]) == (None, 0, 1)
    assert "nothing to compare" in read(build_report(run.folder)).text


def test_a_normalizer_that_this_fedkn_does_not_know(tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("kernel", "future"), batch_sizes=(2,))
    run.write_cells()
    assert "not in this fedkn" in read(build_report(run.folder)).text


def test_several_partitions_and_runs_stand_side_by_side(tmp_path: Path, full: RunFolder) -> None:
    run = Synthetic(
        tmp_path / "two",
        normalizers=("kernel", "group"),
        batch_sizes=(2,),
        seeds=3,
        partitions=({"scheme": "iid"}, {"alpha": 0.1, "clients": 300}),
    )
    run.write_extras()
    run.write_cells()
    alone = read(build_report(run.folder))
    assert "iid, 20 clients" in alone.text
    assert "dirichlet 0.1, 300 clients" in alone.text
    path = build_report([run.folder, full])
    assert path == tmp_path / "report-two-full.html"
    both = read(path)
    assert max(both.ids.values()) == 1
    assert "Side by side" in both.text
    for section in (*summary_dict(run.folder)["partitions"], *summary_dict(full)["partitions"]):
        assert section["verdict"] in both.text
    with pytest.raises(UserError, match="twice"):
        build_report([full, full])
    with pytest.raises(UserError, match="no run"):
        build_report([])


def test_settings_that_differ_though_they_should_not(tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("kernel", "group"), batch_sizes=(2,), seeds=1)
    run.cell("kernel", 2, 0)
    run.experiment["train.momentum"] = 0.9
    run.cell("group", 2, 0)
    assert "Not held equal, though no axis of the comparison: train.momentum (0, 0.9)" in (
        read(build_report(run.folder)).text
    )


def test_settings_that_change_no_result_may_differ(tmp_path: Path) -> None:
    """A run that went on with another ``--workers``, watched by somebody else."""
    run = Synthetic(tmp_path / "r", normalizers=("kernel", "group"), batch_sizes=(2,), seeds=1)
    run.cell("kernel", 2, 0)
    run.experiment |= {"workers": 1, "observers.names": "tensorboard"}
    run.cell("group", 2, 0)
    assert "Not held equal" not in read(build_report(run.folder)).text


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("kernel",), batch_sizes=(2,), seeds=1)
    run.cell(
        "kernel", 2, 0, until=1, end={"status": "failed", "error": "<script>alert(1)</script>"}
    )
    text = build_report(run.folder).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


# Mathematics and its end, a page's script, markup, a terminal's commands, bytes that are no UTF-8.
HOSTILE = [
    "$",
    "$\\frac{",
    "a$b$",
    "<script>alert(1)</script>",
    "</svg>",
    "x\n\x1b[2J",
    "\udcff日本",
]


@pytest.mark.filterwarnings("error")
def test_names_of_outside_are_plain_text_everywhere(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9 <b>")
    normalizers = ("kernel", "</table>[/red]")
    run = Synthetic(path, normalizers=normalizers, batch_sizes=(2,), seeds=3)
    run.write_extras()
    run.write_cells()
    tables = [
        dataclasses.replace(
            table,
            classes=HOSTILE,
            counts=[row[: len(HOSTILE)] for row in table.counts],
            notes=["no training image of <i>\x07</i>"],
        )
        for table in run.folder.partitions()
    ]
    run.folder.write_partitions(tables)
    build_report(run.folder)
    text = (path / "report.html").read_text(encoding="utf-8")
    assert all(c.isprintable() or c in "\n" for c in text)
    assert "<script" not in text
    assert "<b>" not in text
    assert "caf\\udce9 &lt;b&gt;" in text
    assert "no training image of &lt;i&gt;\\x07&lt;/i&gt;" in text
    shown = [html_.escape(printable(name, 14), quote=False) for name in HOSTILE]
    picture = text[text.index('<figure class="picture">') :]
    assert [name for name in shown if f">{name}</text>" not in picture] == []
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary_table(run.folder))
    assert "</table>[/red]" in console.export_text()


def test_a_report_is_reproducible(full: RunFolder, html: str) -> None:
    assert build_report(full).read_text(encoding="utf-8") == html


def test_a_normalizer_has_one_colour_everywhere(html: str) -> None:
    keys = set(re.findall(r"--key: var\((--series-\d)\)\"></span>kernel<", html))
    assert len(keys) == 1
    legend = re.search(r"<li>(.*?)kernel</li>", html, re.DOTALL)
    assert legend
    (number,) = set(re.findall(r"\bk(\d)\b", legend[1]))
    assert {f"--series-{number}"} == keys
    assert f"svg .k{number} {{ --of: var(--series-{number}); }}" in html
