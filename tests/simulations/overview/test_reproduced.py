"""Rows of a published table: beside the paper's, and tested where nothing else differs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from simulations.overview.answers import of_table, published_sentences
from simulations.overview.collection import collect, is_collection
from simulations.overview.reproduced import reproduced
from tests.simulations.overview.made import made_row, made_table
from tests.simulations.report.made_runs import made_run

GROUP = [0.60, 0.62, 0.61, 0.63]
BATCH = [0.70, 0.71, 0.73, 0.72]
NONE = [0.50, 0.52, 0.53, 0.51]
SHARDS = [0.30, 0.31, 0.29, 0.32]


@pytest.fixture
def table(tmp_path):
    return made_table(tmp_path)


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "runs"
    path.mkdir()
    return path


def digest(table, out):
    found = collect(out, [table])
    (of,) = found.tables
    return reproduced(of)


def test_rows_are_tested_against_those_that_only_they_differ_from(table, out):
    made_row(table, out, "group", GROUP)
    made_row(table, out, "batch", BATCH)
    made_row(table, out, "none", NONE)
    made_row(table, out, "shards", SHARDS)
    found = digest(table, out)
    fields = [set(of.contest.means) for of in found.contests]
    assert fields == [{"GN", "BN", "none <i>"}, {"BN, shards"}]
    assert len(found.comparisons) == 3
    pair = next(c for c in found.comparisons if c.has("GN", "BN"))
    assert (pair.first, pair.n) == ("BN", 4)
    assert pair.p == pytest.approx(stats.ttest_rel(BATCH, GROUP).pvalue)
    assert pair.difference == pytest.approx(np.mean(BATCH) - np.mean(GROUP))
    (answer,) = of_table(found)
    assert (answer.winner, answer.outcome) == ("BN", "ahead of all others")
    assert answer.behind == ["GN", "none <i>"]


def test_rows_on_other_images_are_not_compared(table, out):
    made_row(table, out, "group", GROUP)
    made_row(table, out, "batch", BATCH, data="others")
    made_row(table, out, "none", NONE, data=None)
    found = digest(table, out)
    assert [set(of.contest.means) for of in found.contests] == [{"GN"}, {"BN"}, {"none <i>"}]
    assert not found.comparisons
    assert of_table(found) == []


def test_the_figures_stand_beside_the_published_ones(table, out, monkeypatch):
    monkeypatch.setattr("simulations.reproduction.outcome._CLASSES", {"cifar10": 2})
    made_row(table, out, "group", GROUP)
    made_row(table, out, "batch", BATCH)
    found = digest(table, out)
    group, batch, shards, none = found.lines
    assert group.difference("best") == pytest.approx(np.mean(GROUP) + 0.05 - 0.615)
    assert group.difference("last") == pytest.approx(np.mean(GROUP) - 0.615)
    low, high = stats.t.interval(0.95, 3, np.mean(GROUP), stats.sem(GROUP))
    assert group.inside("last") == (low <= 0.615 <= high)
    assert group.inside("last")
    assert not batch.inside("best")
    assert math.isnan(shards.difference("best"))
    assert shards.inside("best") is None
    assert math.isnan(none.difference("best"))
    agreement = found.agreement()
    assert (agreement.pairs, agreement.same) == (1, 1)
    assert (agreement.apart, agreement.apart_same) == (1, 1)
    text = " ".join(published_sentences(found))
    assert "2 of 4 rows have results." in text
    assert "The published order is ours in 1 of 1 pair of rows." in text


def test_other_images_are_not_the_papers(table, out):
    # CIFAR-10 has ten classes, these images two.
    made_row(table, out, "group", GROUP, source="image_folder")
    found = digest(table, out)
    line = found.lines[0]
    assert line.inside("best") is None
    assert math.isnan(line.difference("best"))
    assert "not the paper's images" in " ".join(published_sentences(found))


def test_a_run_with_other_settings_is_not_put_beside_the_paper(table, out):
    made_row(table, out, "group", GROUP, changes={"train.momentum": 0.9})
    made_row(table, out, "batch", BATCH)
    found = collect(out, [table])
    assert [left.path.name for left in found.left_out] == ["tiny-small-group"]
    assert "train.momentum" in found.left_out[0].why
    assert list(found.tables[0].rows) == ["batch"]


def test_what_is_no_row_is_a_comparison_of_its_own(table, out):
    made_row(table, out, "batch", BATCH)
    made_run(out / "mine", lambda *_: 0.5)
    (out / "notes.md").write_text("no run")
    (out / "empty").mkdir()
    assert is_collection(out)
    assert not is_collection(out / "mine")
    assert not is_collection(out / "empty")
    assert not is_collection(out / "nothing")
    found = collect(out, [table])
    assert [run.path.name for run in found.studies] == ["mine"]
    assert not found.left_out


def test_a_damaged_run_is_left_out_with_the_reason(table, out):
    made_run(out / "mine", lambda *_: 0.5)
    made_run(out / "damaged", lambda *_: 0.5)
    (out / "damaged" / "experiment.json").write_text("{")
    found = collect(out, [table])
    assert [run.path.name for run in found.studies] == ["mine"]
    (left,) = found.left_out
    assert left.path.name == "damaged"
    assert "experiment.json" in left.why
