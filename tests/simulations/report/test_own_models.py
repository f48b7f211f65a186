"""The clients' own models and the privacy they spent are reported beside the global model."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from simulations.report import build_report, summary_dict, summary_table
from simulations.runs.folder import RunFolder
from simulations.runs.statistics import holm
from tests.simulations.report.synthetic import Synthetic
from tests.simulations.report.test_report import Page, read

NAMES = ("kernel", "fedbn", "layer")


def written(path: Path, **settings: Any) -> RunFolder:
    settings = {"normalizers": NAMES, "batch_sizes": (2,), "keepers": ("fedbn",)} | settings
    run = Synthetic(path, **settings)
    if run.grid.search:
        run.write_search()
    run.write_cells()
    return run.folder


def section_of(run: RunFolder) -> dict[str, Any]:
    (section,) = summary_dict(run)["partitions"]
    return dict(section)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return written(tmp_path_factory.mktemp("runs") / "own", rates=(0.01, 0.05, 0.1))


@pytest.fixture(scope="module")
def page(run: RunFolder) -> Page:
    return read(build_report(run))


def raw(run: RunFolder) -> dict[str, dict[int, list[float]]]:
    """Normalizer -> seed -> the clients' accuracies, straight from the result cells' lines."""
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    found: dict[str, dict[int, list[float]]] = {}
    for line in lines:
        if line["kind"] == "client_evaluation" and line["split"] == "test":
            _, name, *_, seed = line["cell"].split("-")
            of_clients = [client["correct"] / client["examples"] for client in line["clients"]]
            found.setdefault(name, {})[int(seed[1:])] = of_clients
    return found


def test_figures_agree_with_the_raw_lines(run: RunFolder, page: Page) -> None:
    entries = {entry["normalizer"]: entry for entry in section_of(run)["entries"]}
    for name, by_seed in raw(run).items():
        means = [np.mean(clients) for clients in by_seed.values()]
        worst = np.mean([min(clients) for clients in by_seed.values()])
        spread = np.mean([np.std(clients) for clients in by_seed.values()])
        low, high = stats.t.interval(0.95, 4, np.mean(means), stats.sem(means))
        own = entries[name]["own_models"]
        assert own["accuracy"] == pytest.approx(np.mean(means))
        assert own["half_width"] == pytest.approx((high - low) / 2)
        assert (own["worst_tenth"], own["spread"]) == (pytest.approx(worst), pytest.approx(spread))
        assert (own["seeds"], own["failed_clients"]) == (5, 5)
        (row,) = [row for row in page.rows if len(row) == 6 and row[0].startswith(name)]
        assert (
            row[1]
            == f"{100 * entries[name]['accuracy']:.1f}% ± {100 * entries[name]['half_width']:.1f}"
        )
        assert row[2] == f"{100 * np.mean(means):.1f}% ± {50 * (high - low):.1f}"
        assert row[4:] == [f"{100 * worst:.1f}%", f"{100 * spread:.1f}"]


def test_who_keeps_tensors_is_no_loser_of_the_global_contest(run: RunFolder, page: Page) -> None:
    section = section_of(run)
    compared = {d[side] for d in section["differences"] for side in ("ahead", "behind")}
    assert compared == {"kernel", "layer"}
    compared = {d[side] for d in section["own_differences"] for side in ("ahead", "behind")}
    assert compared == {"kernel", "fedbn", "layer"}
    assert section["keep_tensors"] == ["fedbn"]
    first, note, own = section["verdict"].split(". ")
    assert first.startswith("kernel (")
    assert "fedbn" not in first
    assert note == (
        "fedbn keeps tensors on the clients, which the global model lacks: see the clients' own "
        "models"
    )
    assert own.startswith("On the clients' own images: kernel")
    assert "is ahead of every other normalizer at batch size 2" in own
    assert "† keeps tensors on the clients: the global model is evaluated with" in page.text


def test_the_two_figures_are_two_families_of_tests(
    run: RunFolder, page: Page, tmp_path: Path
) -> None:
    by_name = raw(run)
    means = {n: [np.mean(s[i]) for i in range(5)] for n, s in by_name.items()}
    pairs = [("kernel", "fedbn"), ("kernel", "layer"), ("fedbn", "layer")]
    expected = holm([stats.ttest_rel(means[a], means[b]).pvalue for a, b in pairs])
    for difference in section_of(run)["own_differences"]:
        index = [{difference["ahead"], difference["behind"]} == set(pair) for pair in pairs].index(
            True
        )
        assert difference["p_holm"] == pytest.approx(expected[index])
    (of_global,) = section_of(run)["differences"]
    assert of_global["p_holm"] == of_global["p"]  # the only pair of its family
    assert "a family of their own, corrected over all 3 pairs" in page.text


def test_rates_of_who_keeps_tensors_are_judged_by_own_models(run: RunFolder, page: Page) -> None:
    rows = [row for row in page.rows if len(row) == 5 and row[0].startswith("fedbn")]
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    expected = [
        f"{100 * line['mean']:.1f}%"
        for line in lines
        if line["kind"] == "client_evaluation" and line["cell"].startswith("search-fedbn")
    ]
    assert [row[1:4] for row in rows] == [expected]
    assert "fedbn: mean over the clients of their own models" in page.text


def test_only_normalizers_that_keep_tensors(tmp_path: Path) -> None:
    run = written(tmp_path / "r", normalizers=("fedbn", "silobn"), keepers=("fedbn", "silobn"))
    verdict = section_of(run)["verdict"]
    assert verdict.startswith("fedbn and silobn keep tensors on the clients")
    assert "On the clients' own images: " in verdict
    assert "nothing to compare" not in verdict
    assert read(build_report(run)).text


def test_a_normalizer_without_own_result_still_has_its_row(tmp_path: Path) -> None:
    run = written(tmp_path / "r", normalizers=("kernel", "batch", "fedbn"), batch_sizes=(1,))
    rows = [row for row in read(build_report(run)).rows if row[0] == "batch"]
    assert ["batch", "–", "untrainable"] in rows


def test_a_run_without_own_models_has_nothing_on_them(tmp_path: Path) -> None:
    run = written(tmp_path / "r", keepers=None)
    section = section_of(run)
    assert section["own_differences"] == []
    assert all(entry["own_models"] is None for entry in section["entries"])
    text = read(build_report(run)).text
    assert "own models" not in text
    assert "Privacy" not in text


def test_the_terminal_shows_both_figures_in_80_columns(run: RunFolder) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(run))
    text = console.export_text()
    own = {e["normalizer"]: e["own_models"]["accuracy"] for e in section_of(run)["entries"]}
    (row,) = [line.split() for line in text.splitlines() if " fedbn† " in line]
    assert f"{100 * own['fedbn']:.1f}%" in row
    assert "…" not in text


def test_side_by_side_shows_both(tmp_path: Path) -> None:
    run = written(tmp_path / "r", partitions=({"scheme": "iid"}, {"alpha": 0.1}), seeds=3)
    text = read(build_report(run)).text
    assert text.count("own 9") >= 2
    assert text.count("keeps tensors on the clients, which the global model lacks") == 2


def test_late_lost_and_unevaluated_clients_are_among_the_losses(tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("fedbn",), batch_sizes=(2,), seeds=1, keepers=())
    run.cell("fedbn", 2, 0, updates=3, late=[4, 7], state_lost=[3])
    page = read(build_report(run.folder))
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 5}
    assert rows["late updates"][2] == "2 updates (clients 4 and 7)"
    assert rows["clients that lost their state"][2] == "1 time (client 3)"
    assert rows["own models not evaluated"][2:] == ["1 time (client 19)", "keeps no image"]
    assert "unanswered requests" not in rows


def test_devices_with_smaller_batches_are_named_and_are_no_alarm(tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "r", normalizers=("layer",), batch_sizes=(4,), seeds=1, rounds=2)
    run.cell("layer", 4, 0, batch_sizes={"0": 1, "5": 2})
    page = read(build_report(run.folder))
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 5}
    assert rows["divided batches"][2] == "2 updates (clients 0 and 5)"
    assert "batches of 1 and 2 at most" in rows["divided batches"][3]
    assert "Not everything counted" not in page.text


def test_privacy_spent_is_the_last_of_every_client(tmp_path: Path) -> None:
    run = Synthetic(
        tmp_path / "r",
        normalizers=("kernel", "layer"),
        batch_sizes=(2,),
        seeds=2,
        rounds=2,
        **{"privacy.mechanism": "example", "privacy.delta": 1e-4},
    )
    run.cell("kernel", 2, 0, epsilon={"0": 2.5, "3": 1.0})
    run.cell("kernel", 2, 1, epsilon={"0": 7.0}, state_lost=[0])
    run.cell("layer", 2, 0, epsilon={"0": None})
    section = section_of(run.folder)
    kernel, layer = (entry["privacy"] for entry in section["entries"])
    assert kernel["epsilon_largest"] == 7.0
    assert kernel["epsilon_median"] == 2.5
    assert (kernel["delta"], kernel["clients"], kernel["forgotten"]) == (1e-4, 3, 1)
    assert layer["epsilon_largest"] is None
    page = read(build_report(run.folder))
    assert ["kernel", "2", "7", "2.5", "0.0001", "3"] in page.rows
    assert ["layer", "2", "unbounded", "unbounded", "0.0001", "1"] in page.rows
    assert "against those alone who do not know it" in page.text
    assert "1 time: the true figures are higher" in page.text


def test_a_run_cut_short_speaks_of_so_far(tmp_path: Path) -> None:
    run = Synthetic(
        tmp_path / "r", normalizers=NAMES, batch_sizes=(2,), seeds=3, keepers=("fedbn",)
    )
    for name in NAMES:
        run.cell(name, 2, 0)
    verdict = section_of(run.folder)["verdict"]
    assert verdict.startswith("So far, ")
    assert "On the clients' own images, so far: " in verdict
    run.cell("kernel", 2, 1, until=3)
    json.dumps(summary_dict(run.folder), allow_nan=False)
    assert not math.isnan(section_of(run.folder)["entries"][0]["own_models"]["accuracy"])
