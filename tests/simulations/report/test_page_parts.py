"""Parts of the page that tell of tasks, classes, files, models and the end of cells."""

import base64
import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedkn.tasks.metric import ACCURACY, Metric
from simulations.report import build_report, summary_dict
from simulations.runs.folder import RunFolder
from tests.simulations.report.synthetic import Synthetic
from tests.simulations.report.test_report import Page, read

RMSE = Metric("rmse", higher_is_better=False, lowest=0.0, unit="mm")


def written(path: Path, **settings: Any) -> RunFolder:
    run = Synthetic(path, **({"batch_sizes": (2,), "seeds": 3} | settings))
    if run.grid.search:
        run.write_search()
    run.write_cells()
    return run.folder


def files(page: Page) -> dict[str, list[dict[str, str]]]:
    """The CSV files of a page, by what they hold, read back."""
    found = {}
    for link in page.links:
        if link.startswith("data:text/csv;base64,"):
            text = base64.b64decode(link.partition(",")[2]).decode()
            rows = list(csv.DictReader(io.StringIO(text)))
            found[text.partition("\n")[0]] = rows
    return found


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run = written(
        tmp_path_factory.mktemp("runs") / "classes",
        normalizers=("kernel", "none"),
        metric=ACCURACY,
        classes=4,
        rates=(0.01, 0.05),
    )
    return read(build_report(run))


def test_a_metric_of_which_lower_is_better_has_its_unit_and_its_order(tmp_path: Path) -> None:
    run = written(tmp_path / "r", normalizers=("none", "kernel"), metric=RMSE, rates=(0.01, 0.05))
    page = read(build_report(run))
    entries = {e["normalizer"]: e for e in summary_dict(run)["partitions"][0]["entries"]}
    assert entries["kernel"]["rmse"] < entries["none"]["rmse"]
    assert "accuracy" not in entries["kernel"]
    assert set(entries["kernel"]["rmse_by_seed"]) == {"0", "1", "2"}
    rows = [row for row in page.rows if row[0] in ("kernel", "none") and "mm" in "".join(row)]
    # The heat table, then the summary: best first.
    assert [row[0] for row in rows[:4]] == ["kernel", "none"] * 2
    assert f"{entries['kernel']['rmse']:.3g} mm" in rows[2][1]
    assert rows[2][2] == "best mean"
    assert re.fullmatch(r"\+[\d.]+ mm", rows[3][2])
    assert "lower is better" in page.text
    assert "Rmse by normalizer and batch size" in page.text
    assert "%" not in " ".join(cell for row in rows for cell in row)


def test_each_class_and_its_confusions_are_shown(classes: Page) -> None:
    table = files(classes)["normalizer,batch_size,class,metric,mean,half_width,seeds"]
    confusions = files(classes)["normalizer,batch_size,true_class,predicted_class,examples"]
    assert len(table) == 2 * 4
    for row in table:
        of = [
            (line["predicted_class"], int(line["examples"]))
            for line in confusions
            if (line["normalizer"], line["true_class"]) == (row["normalizer"], row["class"])
        ]
        # 36 examples of each class for each of three seeds.
        assert sum(count for _, count in of) == 3 * 36
        right = sum(count for name, count in of if name == row["class"])
        assert float(row["mean"]) == pytest.approx(right / (3 * 36))
    shown = {row[0]: row[1:] for row in classes.rows if row[0] in "0123" and len(row) == 3}
    assert shown["3"] == ["0.0% ± 0.0", "0.0% ± 0.0"]
    kernel = next(
        float(r["mean"]) for r in table if (r["normalizer"], r["class"]) == ("kernel", "0")
    )
    assert shown["0"][0].startswith(f"{100 * kernel:.1f}%")


def test_files_have_what_tables_show_with_all_digits(classes: Page) -> None:
    found = files(classes)
    results = found[
        "normalizer,batch_size,mean,half_width,seeds,planned,rounds_to_target,reached_target"
    ]
    by_seed = found["normalizer,batch_size,seed,value,own_models"]
    rounds = found["normalizer,batch_size,seed,round,value,loss,train_loss"]
    for row in results:
        values = [float(r["value"]) for r in by_seed if r["normalizer"] == row["normalizer"]]
        last = [
            float(r["value"])
            for r in rounds
            if (r["normalizer"], r["round"]) == (row["normalizer"], "12")
        ]
        assert sorted(values) == sorted(last)
        assert float(row["mean"]) == pytest.approx(np.mean(values), abs=1e-15)
        assert f"{100 * float(row['mean']):.1f}%" in classes.text
    rates = found["normalizer,batch_size,learning_rate,value,cells,chosen,own_models"]
    assert [row["learning_rate"] for row in rates] == ["0.01", "0.05"] * 2
    assert sum(int(row["chosen"]) for row in rates) == 2


def test_text_of_outside_begins_no_formula_in_a_file(tmp_path: Path) -> None:
    run = written(tmp_path / "r", normalizers=("kernel", "=1+1"))
    page = read(build_report(run))
    names = {row["normalizer"] for of in files(page).values() for row in of if "normalizer" in row}
    assert "'=1+1" in names
    assert "=1+1" not in names


def test_further_metrics_stand_in_a_table_of_their_own(classes: Page) -> None:
    (start,) = [i for i, row in enumerate(classes.rows) if row == ["normalizer", "other"]]
    assert [row[0] for row in classes.rows[start + 2 : start + 4]] == ["kernel", "none"]


def test_classes_of_a_run_without_classes_are_not_spoken_of(tmp_path: Path) -> None:
    page = read(build_report(written(tmp_path / "r", normalizers=("kernel",), metric=RMSE)))
    assert "Confusion" not in page.text


def test_many_normalizers_and_classes_give_a_page_that_can_be_sent(tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(19)]
    path = build_report(
        written(tmp_path / "r", normalizers=names, batch_sizes=(2, 8), metric=ACCURACY, classes=100)
    )
    page = read(path)
    assert path.stat().st_size < 4_000_000
    pictures = path.read_text().count('aria-label="confusions of')
    left_out = sum(map(int, re.findall(r"(\d+) confusion matri", page.text)))
    assert pictures + left_out == 2 * 19
    assert pictures > 19


def test_every_picture_says_what_it_shows_and_tables_can_be_scrolled_by_keys(classes: Page) -> None:
    assert classes.pictures
    assert all(len(label) > 20 for label in classes.pictures)
    assert all(keys == "0" and label for keys, label in classes.regions)
    assert len(classes.regions) == sum("scroll" in c for c in classes.classes)


MODEL: dict[str, Any] = {
    "parameters": 1000,
    "trained": 900,
    "frozen": ["stem.<weight>"],
    "frozen_tensors": 3,
    "alone": "",
    "weights": {"sha256": "ab" * 32, "left": []},
    "conversion": {
        "changed": [["features.0", "Conv2d(3, 8)", "KNConv2d(3, 8)", "padding kept"]],
        "kept": [["classifier", "BatchNorm1d(8)", "not after a <convolution>"]],
        "all_changed": 1,
        "all_kept": 1,
        "traced": False,
    },
}


def test_how_the_models_came_about(tmp_path: Path) -> None:
    run = Synthetic(
        tmp_path / "r", normalizers=("kernel", "group"), batch_sizes=(2,), seeds=1, model=MODEL
    )
    run.write_cells()
    page = read(build_report(run.folder))
    assert "78,042 trained, of 1,000" in page.text
    assert "900 of 1,000 parameters are trained. Frozen: stem.<weight> and 2 more." in page.text
    assert ["features.0", "Conv2d(3, 8)", "KNConv2d(3, 8)", "padding kept"] in page.rows
    assert ["classifier", "BatchNorm1d(8)", "kept", "not after a <convolution>"] in page.rows
    assert "How the models came about kernel, group" in page.text


def test_when_cells_ended_and_which_round_was_best(tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("kernel",), batch_sizes=(2,), seeds=2)
    ends = {"status": "completed", "rounds": 12, "best_round": 9, "weights_sha256": "0" * 64}
    run.cell("kernel", 2, 0, end=ends)
    run.cell("kernel", 2, 1, end=ends | {"best_round": 12})
    page = read(build_report(run.folder))
    assert any(
        row[:5] == ["kernel", "2", "all rounds were run", "12, 12", "9, 12"] for row in page.rows
    )
    assert "The results are of the last round." in page.text


def test_a_single_seed_has_no_interval_and_no_nan(tmp_path: Path) -> None:
    run = written(tmp_path / "r", normalizers=("kernel",), seeds=1, metric=ACCURACY, classes=3)
    text = build_report(run).read_text()
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower().replace("nan or", "")
    assert "one seed" in text


@pytest.mark.parametrize("seeds", [2, 6])
def test_a_legend_of_one_shade_denies_no_test(
    seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All may look alike, joined by pairs, where the best and the last are told apart."""
    monkeypatch.setattr("simulations.report.section.shades", lambda contests: {})
    run = written(tmp_path / "run", normalizers=("kernel", "group", "none"), seeds=seeds)
    page = build_report([run], tmp_path / "page.html").read_text(encoding="utf-8")
    cells = page.count("<small>behind the best</small>")
    assert (cells > 0) == (seeds > 2)
    assert "so all look alike" in page
    assert ("behind the best is who the tests tell apart from it" in page) == (cells > 0)
