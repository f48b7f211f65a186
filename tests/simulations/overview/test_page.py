"""The page over many runs: whole by itself, escaped, small, the winner of a setting first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

from fedkn.errors import UserError
from simulations.cli import app
from simulations.overview.collection import collect
from simulations.overview.markdown import blocks, filled
from simulations.overview.page import overview, write_page
from simulations.runs.folder import RunFolder
from tests.simulations.overview.made import made_row, made_table
from tests.simulations.report.made_runs import made_run
from tests.simulations.report.synthetic import Synthetic
from tests.simulations.report.test_report import read
from tests.simulations.trained_runs import fedkn

GROUP = [0.60, 0.62, 0.61, 0.63]
BATCH = [0.70, 0.71, 0.73, 0.72]


def clear(name: str, size: int, point: object, seed: int) -> float:
    """Group ahead at batch 2, kernel at batch 4, by far more than the seeds differ."""
    ahead = {2: "group", 4: "kernel"}[size]
    return (0.9 if name == ahead else 0.6) + 0.001 * ((seed * 7 + len(name)) % 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("many")
    out = base / "runs"
    out.mkdir()
    table = made_table(base)
    made_row(table, out, "group", GROUP)
    made_row(table, out, "batch", BATCH)
    made_run(out / "clear", clear, batch_sizes=(2, 4))
    made_run(out / "<b>& 50%", lambda n, *_: 0.5 + 0.1 * (n == "kernel"), seeds=(0, 1))
    (out / "damaged").mkdir()
    (out / "damaged" / "experiment.json").write_text("[]")
    return out, table


@pytest.fixture(scope="module")
def page(folder):
    out, table = folder
    return write_page(overview(collect(out, [table])))


def test_the_winner_of_each_setting_comes_first(page):
    assert page.name == "results.html"
    found = read(page)
    rows = [row for row in found.rows if row and row[0].startswith("dirichlet")]
    by_size = {row[0].rpartition(" ")[2]: row for row in rows if "90." in row[1]}
    assert by_size["2"][1].startswith("group 90.")
    assert by_size["4"][1].startswith("kernel 90.")
    assert by_size["2"][2] == by_size["4"][2] == "ahead of all others"
    text = found.text
    assert text.index("What the comparisons answer") < text.index("Contents")
    assert "Of 3 settings kernel has the best mean in 2 and group in 1." in text
    # Two seeds make no test, and the page does not pretend that they do.
    assert "not tested: fewer than 3 common seeds" in text
    assert "In 1 of them are fewer than 3 common seeds for a test" in text


def test_published_figures_stand_beside_ours(page):
    row = next(row for row in read(page).rows if row[:2] == ["GN", "61.5%"])
    assert row[2].startswith("66.5% ± ")
    assert row[3].startswith("61.5% ± ")
    assert row[5:7] == ["4 of 4", "3"]
    text = read(page).text
    assert "Nothing is as in the paper." in text
    assert "Not run: BN, shards, none <i>." in text
    assert "fedkn reproduce tiny --scale small --root DATA --out" in text


def test_it_is_one_file_of_its_own_and_nothing_of_outside_is_markup(page):
    source = page.read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|iframe|img|object)\b", source)
    outside = [
        of
        for of in re.findall(r'(?:href|src)="([^"]*)"', source)
        if not of.startswith(("#", "data:text/csv;base64,"))
    ]
    assert outside
    assert all((page.parent / unquote(of)).is_dir() for of in outside)
    assert "url(" not in source
    assert "<b>" not in source
    assert "<i>" not in source
    assert "&lt;b&gt;&amp; 50%" in source
    identities = re.findall(r'id="([^"]*)"', source)
    assert len(identities) == len(set(identities))
    for target in re.findall(r'href="#([^"]*)"', source):
        assert target in identities
    # Every figure says its numbers to those who cannot see it.
    figures = re.findall(r'<svg class="figure"[^>]*>', source)
    assert figures
    assert all(re.search(r'role="img" aria-label="[^"]+"', figure) for figure in figures)


def test_what_is_left_out_is_said(page):
    assert "damaged: " in read(page).text


def test_links_lead_to_the_runs_from_wherever_the_page_is(folder, tmp_path):
    out, table = folder
    page = write_page(overview(collect(out, [table])), tmp_path / "page.html")
    links = re.findall(r'href="([^"#:]*/)"', page.read_text(encoding="utf-8"))
    assert links
    assert all((tmp_path / unquote(link) / "experiment.json").is_file() for link in links)


def test_a_hundred_cells_stay_small(tmp_path):
    run = Synthetic(
        tmp_path / "runs" / "many",
        normalizers=("kernel", "ws_group", "group", "layer", "none"),
        batch_sizes=(1, 2, 4, 8),
        seeds=5,
        rounds=40,
    )
    run.write_cells()
    page = write_page(overview(collect(tmp_path / "runs", [])))
    assert page.stat().st_size < 1_000_000


def test_the_command_and_its_json(folder, tmp_path):
    out, _ = folder
    result = CliRunner().invoke(app, ["report", str(out), "--out", str(tmp_path / "p.html")])
    assert result.exit_code == 0
    assert "Left out: damaged" in result.stdout
    assert (tmp_path / "p.html").is_file()
    result = CliRunner().invoke(
        app, ["report", str(out), "--json", "--out", str(tmp_path / "p.html")]
    )
    told = json.loads(result.stdout)
    assert told["report"] == str(tmp_path / "p.html")
    answers = {(of["of"], of["where"][-1]): of for of in told["answers"]}
    assert answers["clear", "2"]["best"] == "group"
    assert answers["clear", "2"]["behind"] == ["kernel"]
    assert [left["folder"].rpartition("/")[2] for left in told["left_out"]] == ["damaged"]
    assert fedkn("report", out, out / "clear") == 2


def test_blocks_are_written_between_their_marks_and_nowhere_else(folder):
    out, table = folder
    found = blocks(overview(collect(out, [table])))
    assert set(found) == {"tiny-small", "clear", "%3Cb%3E%26%2050%25", "power"}
    begin, end = "<!-- clear: make docs writes it -->\n", "<!-- end of clear -->\n"
    gone = "<!-- gone: make docs writes it -->\n<!-- end of gone -->\n"
    page = f"# Mine\n\n{begin}old\n{end}\nOurs.\n\n{gone}"
    once = filled(page, found)
    assert once.startswith(f"# Mine\n\n{begin}\n```\nfedkn compare --name clear\n")
    assert "\nold\n" not in once
    assert "\nOurs.\n" in once
    assert "gone" not in once
    assert once.count("<!-- end of power -->") == 1
    assert filled(once, found) == once
    assert "| group (≤ 8 groups) | **90.2% ± 0.3** |" in once
    # What the spread says of the seeds that a point takes: there are tests in two of them.
    assert "| clear | 4 | 2 |" in found["power"]
    assert "| tiny, small scale | 4 | 1 |" in found["power"]


def test_a_folder_without_runs_is_refused(tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="holds no run folders"):
        collect(tmp_path / "nothing", [])
    assert fedkn("report", tmp_path / "nothing") == 2


def test_run_folders_are_left_as_they_are(folder, page):
    out, _ = folder
    assert not (out / "clear" / "report.html").exists()
    assert RunFolder.open(out / "clear").grid.name == "clear"
    assert Path(page).parent == out
