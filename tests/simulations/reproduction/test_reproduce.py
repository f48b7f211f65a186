"""A small table is run, stopped, kept in a repository, and gone on with elsewhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedkn.errors import UserError
from fedkn.seeds import numpy_generator
from simulations.api import running
from simulations.reproduction import published
from simulations.reproduction.outcome import markdown, to_json
from simulations.reproduction.reproduce import estimate, outcomes_of, plans, reproduce
from simulations.runs.folder import RunFolder
from simulations.runs.publishing import publish
from simulations.runs.statistics import mean_interval
from tests.simulations.trained_runs import fedkn

TABLE = """
title = "A small table"
paper = "Nobody et al."
reading = "best"
reading_note = "It takes the best round."
differences = ["Nothing is as in the paper."]
[protocol]
rounds = 3
cohort = 2
[protocol.data]
source = "arrays"
validation_fraction = 0
test_limit = 40
[protocol.partition]
scheme = "iid"
clients = 3
[protocol.model]
name = "convnet3"
width = 4
final_norm = "none"
[protocol.train]
local_steps = 3
learning_rate = 0.05
[scale.small]
note = "Small: 3 rounds."
seeds = 2
[scale.paper]
note = "Paper: 30 rounds."
seeds = 3
[scale.paper.settings]
rounds = 30
[[rows]]
name = "group"
label = "GN"
published = 61.5
spread = 0.4
[rows.settings]
normalizer.name = "group"
[[rows]]
name = "none"
label = "none"
reason = "the paper has no such row"
[rows.settings]
normalizer.name = "none"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    generator = numpy_generator("reproduction")
    labels = np.arange(160) % 4
    images = generator.integers(0, 80, (160, 8, 8), dtype=np.uint8)
    images[np.arange(160), labels * 2] += 150
    np.savez(
        path,
        images=images[:120],
        labels=labels[:120],
        test_images=images[120:],
        test_labels=labels[120:],
    )
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    (folder / "tiny.toml").write_text(TABLE)
    return published.table("tiny", folder)


def run(table, out, data, *rows, seeds=None):
    todo = plans(table, "small", rows, out, seeds=seeds, changes={"data.root": str(data)})
    outcomes = reproduce(table, "small", todo, out, workers=1, progress=False, command="fedkn x")
    return {outcome.row.name: outcome for outcome in outcomes}, todo


@pytest.fixture(scope="module")
def whole(table, data, tmp_path_factory) -> Path:
    """Both rows, run."""
    out = tmp_path_factory.mktemp("whole")
    run(table, out, data)
    return out


def numbers(out, table):
    rows = to_json(table, "small", outcomes_of(table, "small", out))["rows"]
    return [{key: row[key] for key in row if key != "minutes"} for row in rows]


def hashes(folder):
    return {cell.id: cell.weights_sha256 for cell in RunFolder.open(folder).cells()}


def test_each_row_is_a_run_folder_and_the_table_has_both_readings(whole, table, data):
    assert {path.name for path in whole.iterdir()} == {
        *("tiny-small-group", "tiny-small-none", "tiny-small.md", "tiny-small.json"),
    }
    cells = RunFolder.open(whole / "tiny-small-group").cells()
    best = [max(v for r, v in cell.values("test").items() if r) for cell in cells]
    last = [cell.values("test")[3] for cell in cells]
    row, other = json.loads((whole / "tiny-small.json").read_text())["rows"]
    assert (row["published"], other["published"]) == (0.615, None)
    for reading, values in (("best", best), ("last", last)):
        interval = mean_interval(values, 0.0, 1.0)
        assert row[reading] == {
            "mean": interval.mean,
            "low": interval.low,
            "high": interval.high,
        }
    page = (whole / "tiny-small.md").read_text()
    assert "| GN | 61.5% ± 0.4 |" in page
    assert "| none | none |" in page
    assert "- none: the paper has no such row." in page
    assert "ours, best round (as the paper)" in page
    assert "Nothing is as in the paper." in page


def test_what_is_finished_is_kept_and_a_row_alone_gives_the_same(whole, table, data, tmp_path):
    before = (whole / "tiny-small-group" / "metrics.jsonl").read_bytes()
    _, todo = run(table, whole, data)
    assert [plan.left for plan in todo] == [0, 0]
    assert (whole / "tiny-small-group" / "metrics.jsonl").read_bytes() == before
    outcomes, _ = run(table, tmp_path, data, "none")
    assert outcomes["group"].rounds is None
    assert hashes(tmp_path / "tiny-small-none") == hashes(whole / "tiny-small-none")


def test_without_checkpoints_elsewhere_the_table_is_the_same(whole, table, data, tmp_path):
    """As from a repository: one cell is finished, the other was in flight."""
    source = tmp_path / "first"
    shutil.copytree(whole, source)
    run_folder = source / "tiny-small-group"
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = [n for n, line in enumerate(lines) if '"kind": "end"' in line][-1]
    (run_folder / "metrics.jsonl").write_text("".join(lines[: last - 2]))
    kept = publish(RunFolder.open(run_folder), tmp_path / "kept")
    assert not list(kept.rglob("*.safetensors"))
    assert not (kept / "cells").exists()
    text = "".join(path.read_text() for path in kept.iterdir())
    assert str(data.parent) not in text
    assert str(tmp_path) not in text
    moved = tmp_path / "elsewhere" / "copy.npz"
    moved.parent.mkdir()
    shutil.copy(data, moved)
    finished = [cell.id for cell in RunFolder.open(kept).cells()]
    assert len(finished) == 1
    first = [
        line for line in (kept / "metrics.jsonl").read_text().splitlines() if finished[0] in line
    ]
    run(table, tmp_path / "kept", moved, "group")
    after = (kept / "metrics.jsonl").read_text().splitlines()
    assert [line for line in after if finished[0] in line] == first
    assert hashes(kept) == hashes(whole / "tiny-small-group")
    assert numbers(tmp_path / "kept", table)[0] == numbers(whole, table)[0]
    assert fedkn("report", kept) == 0
    assert (kept / "report.html").exists()


def test_more_seeds_are_added_and_fewer_take_nothing_away(whole, table, data, tmp_path):
    shutil.copytree(whole, tmp_path / "runs")
    before = hashes(tmp_path / "runs" / "tiny-small-group")
    outcomes, _ = run(table, tmp_path / "runs", data, "group", seeds=3)
    assert outcomes["group"].best.n == outcomes["group"].planned == 3
    after = hashes(tmp_path / "runs" / "tiny-small-group")
    assert {cell: after[cell] for cell in before} == before
    assert len(RunFolder.open(tmp_path / "runs" / "tiny-small-group").partitions()) == 3
    outcomes, todo = run(table, tmp_path / "runs", data, "group", seeds=1)
    assert (outcomes["group"].best.n, todo[0].left) == (3, 0)


def test_other_data_and_other_settings_are_refused(whole, table, data, tmp_path):
    shutil.copytree(whole, tmp_path / "runs")
    other = tmp_path / "other.npz"
    arrays = dict(np.load(data))
    arrays["labels"] = arrays["labels"][::-1]
    np.savez(other, **arrays)
    folder = tmp_path / "runs" / "tiny-small-group"
    before = {path: path.read_bytes() for path in folder.iterdir() if path.suffix == ".json"}
    with pytest.raises(UserError, match="data changed"):
        running.resume(folder, root=other, seeds=3, progress=False)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(UserError, match="2 seeds already"):
        running.resume(folder, seeds=1, progress=False)
    changed = table.model_copy(
        update={"protocol": {**table.protocol, "train": {"learning_rate": 0.1, "local_steps": 3}}}
    )
    with pytest.raises(UserError, match=r"train\.learning_rate = 0\.05, and here it is 0\.1"):
        run(changed, tmp_path / "runs", data)
    with pytest.raises(UserError, match="give --source arrays"):
        plans(table, "small", [], tmp_path / "runs", seeds=1, changes={"data.source": "digits"})


def test_what_all_rows_take_is_said_before(table, data, tmp_path):
    said = []
    todo = plans(table, "paper", [], tmp_path, seeds=None, changes={"data.root": str(data)})
    estimate(todo, said.append)
    assert said[0].startswith("group: 3 of 3 cells left, about ")
    assert said[-1].startswith("All of it: about ")
    with pytest.raises(UserError, match=r"data\.root|--root"):
        estimate(plans(table, "paper", [], tmp_path, seeds=1, changes={}), said.append)
    assert not list(tmp_path.iterdir())


def test_a_row_that_was_begun_knows_where_its_data_lie(whole, table):
    (plan,) = plans(table, "small", ["group"], whole, seeds=3, changes={})
    assert plan.left == 1
    assert plan.core_seconds() > 0


def test_a_copy_is_brought_up_to_date_but_never_over_another_run(whole, tmp_path):
    runs = [RunFolder.open(whole / f"tiny-small-{name}") for name in ("group", "none")]
    kept = publish(runs[0], tmp_path)
    content = (kept / "metrics.jsonl").read_bytes()
    assert publish(runs[0], tmp_path) == kept
    assert (kept / "metrics.jsonl").read_bytes() == content
    kept.rename(tmp_path / "tiny-small-none")
    with pytest.raises(UserError, match="another run"):
        publish(runs[1], tmp_path)
    with pytest.raises(UserError, match="already"):
        publish(runs[0], whole)


def test_a_copy_of_the_run_before_it_grew_is_brought_up_to_date_and_no_other(whole, tmp_path):
    run = RunFolder.open(whole / "tiny-small-group")
    kept = publish(run, tmp_path)
    grid = json.loads((kept / "grid.json").read_text())

    def published_over(**changes):
        before = {**grid, **changes}
        before.pop("compare.weights_sha256")  # a setting that the fedkn of then did not know
        (kept / "grid.json").write_text(json.dumps(before))
        publish(run, tmp_path)
        assert json.loads((kept / "grid.json").read_text()) == grid

    published_over(**{"compare.seeds": 1})
    published_over(**{"compare.normalizers": [], "compare.batch_sizes": []})
    for other in (
        {"compare.normalizers": [*grid["compare.normalizers"], "kernel"]},
        {"rounds": grid["rounds"] + 1},
        {"compare.dropped_since": 1},
    ):
        with pytest.raises(UserError, match="another run"):
            published_over(**other)


def test_another_source_of_the_images_is_said(whole, table):
    outcomes = outcomes_of(table, "small", whole)
    assert "in place of" not in markdown(table, "small", outcomes, "fedkn x")

    def told_of(source: str) -> str:
        protocol = {**table.protocol, "data": {"source": source}}
        of = table.model_copy(update={"protocol": protocol})
        return markdown(of, "small", outcomes, "fedkn x")

    assert "'arrays' in place of 'image_folder'" in told_of("image_folder")
    # CIFAR-10 has ten classes, what these rows were run on has four.
    assert "these are not the paper's images" in told_of("cifar10")


def test_the_command_lists_and_refuses(capsys):
    assert fedkn("reproduce") == 0
    assert "hybridbn: " in capsys.readouterr().out
    assert fedkn("reproduce", "hybridbm") == 2
    assert "did you mean" in capsys.readouterr().err
