"""Further axes in the report, and runs side by side: tested where that means something."""

import json
import math
from collections.abc import Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedkn.seeds import numpy_generator
from fedkn.tasks.metric import Metric
from simulations.report import build_report, digest_dict, summary_dict, summary_table
from simulations.report.summary import digest, summarize
from simulations.runs.records import partition_label
from tests.simulations.report.made_runs import made_run

SEEDS = range(5)
AXES = {"strategy.name": ["fedavg", "scaffold"], "train.momentum": [0.0, 0.9]}
EFFECTS = {"kernel": 0.05, "group": 0.0, "scaffold": 0.06, "fedavg": 0.0}


def noisy(name: str, size: int, point: Mapping[str, Any], seed: int, shift: float = 0.0) -> float:
    noise = 0.004 * numpy_generator(seed, name, size, repr(sorted(point.items()))).normal()
    luck = 0.03 * numpy_generator(seed, "luck").normal()
    return float(
        0.7 + EFFECTS[name] + EFFECTS[point.get("strategy.name", "fedavg")] + shift + luck + noise
    )


def holm_by_hand(p_values: list[float]) -> list[float]:
    """The definition, step by step: the k-th smallest of m times m - k + 1, never falling."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected


def test_normalizers_and_values_of_axes_are_one_family(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", noisy, seeds=SEEDS, batch_sizes=(2, 8), axes=AXES)
    (summary,) = summarize([run])
    expected = {}
    places = [dict(zip(AXES, v, strict=True)) for v in product(*AXES.values())]

    def p_of(one: tuple[Any, ...], other: tuple[Any, ...]) -> float:
        return float(
            stats.ttest_rel(
                [noisy(*one, seed) for seed in SEEDS], [noisy(*other, seed) for seed in SEEDS]
            ).pvalue
        )

    for point, size in product(places, (2, 8)):
        key = ("normalizer", tuple(point.values()), size, "", frozenset(("kernel", "group")))
        expected[key] = p_of(("kernel", size, point), ("group", size, point))
    for axis, name, size in product(AXES, ("kernel", "group"), (2, 8)):
        (other,) = (key for key in AXES if key != axis)
        for held in AXES[other]:
            for one, two in combinations(AXES[axis], 2):
                points = [{axis: v, other: held} for v in (one, two)]
                texts = frozenset(v if isinstance(v, str) else str(v) for v in (one, two))
                expected[axis, (held,), size, name, texts] = p_of(
                    *((name, size, {key: point[key] for key in AXES}) for point in points)
                )
    found = {
        (
            c.group.axis,
            tuple(type(AXES[key][0])(value) for key, value in c.group.point),
            c.group.batch_size,
            c.group.normalizer,
            frozenset((c.first, c.second)),
        ): c
        for c in summary.comparisons
    }
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 4 + 2 * (2 * 2 * 2)
    corrected = dict(zip(expected, holm_by_hand(list(expected.values())), strict=True))
    for key, comparison in found.items():
        assert comparison.p == pytest.approx(expected[key], rel=1e-9)
        assert comparison.p_holm == pytest.approx(corrected[key], rel=1e-9)


def test_the_verdict_names_what_the_axis_shows_and_where(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", noisy, seeds=SEEDS, axes=AXES)
    (summary,) = summarize([run])
    strategy, momentum, _ = summary.axis_verdicts
    start = "Between values of strategy.name: all else being equal, in 4 comparisons: scaffold is"
    assert strategy.startswith(f"{start} ahead of fedavg in 4, by ")
    assert "kernel at batch size 2" in strategy
    assert momentum == (
        "Between values of train.momentum: no difference is shown in any of 4 comparisons, all "
        "else being equal."
    )
    assert len(summary.sections) == 4
    assert [dict(section.point)["strategy.name"] for section in summary.sections] == [
        *("fedavg", "fedavg"),
        *("scaffold", "scaffold"),
    ]
    for section in summary.sections:
        assert "kernel" in section.verdict.split()[0]
    page = build_report(run).read_text(encoding="utf-8")
    assert strategy.split(":")[0] in page
    assert "strategy.name scaffold, train.momentum 0.9" in page
    told = summary_dict(run)
    json.dumps(told, allow_nan=False)
    assert told["axes"] == {
        "strategy.name": ["fedavg", "scaffold"],
        "train.momentum": ["0.0", "0.9"],
    }
    assert len(told["axis_differences"]) == 8
    assert told["partitions"][0]["axes"] == {"strategy.name": "fedavg", "train.momentum": "0.0"}
    assert summary_table(run) is not None


def test_below_three_seeds_an_axis_shows_nothing(tmp_path: Path) -> None:
    axes = {"strategy.name": ["fedavg", "scaffold"]}
    run = made_run(tmp_path / "r", noisy, seeds=(0, 1), axes=axes)
    (verdict,) = summarize([run])[0].axis_verdicts
    assert "fewer than 3 common seeds no difference can be shown" in verdict


def test_values_of_an_axis_on_other_data_are_not_tested(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", noisy, axes={"data.source": ["digits", "mnist"]})
    (summary,) = summarize([run])
    assert summary.axis_contests == []
    assert {c.group.axis for c in summary.comparisons} == {"normalizer"}


def test_runs_with_the_same_data_are_tested_against_each_other(tmp_path: Path) -> None:
    one = made_run(tmp_path / "plain", noisy, seeds=SEEDS)
    other = made_run(
        tmp_path / "momentum",
        lambda *where: noisy(*where, shift=0.1),
        seeds=range(1, 9),
        normalizers=("kernel", "group"),
        train__momentum=0.9,
    )
    digested = digest([one, other])
    beside = digested.beside
    assert beside is not None
    assert beside.common == 2 * 4  # two normalizers, seeds 1 to 4
    assert beside.untested == []
    (difference,) = beside.differences
    assert difference.key == "train.momentum"
    assert difference.values == {"plain": ["0.0"], "momentum": ["0.9"]}
    assert len(digested.contests) == 2
    for contest in digested.contests:
        assert contest.axis == "run"
        (comparison,) = contest.contest.comparisons
        assert (comparison.first, comparison.second, comparison.n) == ("momentum", "plain", 4)
        name = contest.held.normalizer
        expected = stats.ttest_rel(
            [noisy(name, 2, {}, seed) + 0.1 for seed in range(1, 5)],
            [noisy(name, 2, {}, seed) for seed in range(1, 5)],
        )
        assert comparison.difference == pytest.approx(0.1)
        # The differences are equal but for rounding: the exact test stands in.
        assert comparison.p in (pytest.approx(expected.pvalue), 0.125)
    # One family: two comparisons within each run, and two between them.
    assert len({id(c) for c in digested.runs[0].comparisons}) == 4
    (verdict,) = digested.verdicts
    assert verdict.startswith("Between the runs: ")
    assert not (one.path / "report.html").exists()
    page = build_report([one, other], tmp_path / "both.html")
    assert page == tmp_path / "both.html"
    text = page.read_text(encoding="utf-8")
    assert "The runs against each other" in text
    assert "train.momentum" in text
    told = digest_dict([one, other])
    json.dumps(told, allow_nan=False)
    assert told["beside"]["settings"] == {"train.momentum": {"plain": ["0.0"], "momentum": ["0.9"]}}
    assert digest_dict([one])["beside"] is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"data": "others"},
            "plain and other are not tested against each other: their data differ",
        ),
        ({"data": None}, "other recorded no fingerprint of the data"),
        ({"normalizers": ("batch",)}, "they have no cell in common"),
        ({"seeds": (7, 8, 9)}, "they have no cell in common"),
        (
            {"metric": Metric("rmse", higher_is_better=False, lowest=0.0)},
            "they are judged by different metrics (accuracy and rmse)",
        ),
    ],
)
def test_runs_that_cannot_be_compared_say_why(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    def value(name: str, size: int, point: Mapping[str, Any], seed: int) -> float:
        return 0.7 + 0.01 * seed + 0.001 * len(name)

    one = made_run(tmp_path / "plain", value)
    other = made_run(tmp_path / "other", value, **changes)
    digested = digest([one, other])
    assert digested.beside is not None
    (said,) = digested.beside.untested
    assert reason in said
    assert digested.contests == []
    assert reason.split(":", maxsplit=1)[0] in build_report([one, other]).read_text(
        encoding="utf-8"
    )
    assert len(digested.runs) == 2


def test_clients_that_keep_other_parts_leave_their_own_models_untested(tmp_path: Path) -> None:
    one = made_run(tmp_path / "plain", noisy, evaluation__client_fraction=0.2)
    other = made_run(tmp_path / "other", noisy, evaluation__client_fraction=0.4)
    digested = digest([one, other])
    assert digested.beside is not None
    (said,) = digested.beside.untested
    assert "evaluation.client_fraction" in said
    assert digested.own_contests == []


def test_a_run_with_an_axis_stands_beside_one_without(tmp_path: Path) -> None:
    axes = {"strategy.name": ["fedavg", "scaffold"]}
    one = made_run(tmp_path / "varied", noisy, seeds=SEEDS, axes=axes)
    other = made_run(tmp_path / "plain", noisy, seeds=SEEDS, strategy__name="scaffold")
    digested = digest([one, other])
    between = [contest for contest in digested.contests if contest.axis == "run"]
    assert len(between) == 2
    assert {contest.held.point for contest in between} == {(("strategy.name", "scaffold"),)}
    assert digested.beside is not None
    assert digested.beside.differences == []


def test_an_old_run_without_axes_is_read(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", noisy)
    path = run.path / "experiment.json"
    record = json.loads(path.read_text())
    del record["axes"]
    path.write_text(json.dumps(record))
    (summary,) = summarize([run])
    assert summary.axis_contests == []
    (section,) = summary.sections
    assert section.label == partition_label(summary.cells[0].config.partition)
    assert not math.isnan(section.entries["kernel", 2].accuracy.mean)
