"""Main effects and interactions, held to a least-squares fit of the whole factorial."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedkn.seeds import numpy_generator
from fedkn.tasks.metric import Metric
from simulations.overview.collection import collect
from simulations.overview.markdown import blocks
from simulations.overview.page import overview
from simulations.report import build_report, summary_dict
from simulations.report.effects import Effect
from simulations.report.summary import summarize
from simulations.runs.folder import RunFolder
from tests.simulations.report.made_runs import made_run

SEEDS = range(5)
NAMES = ("kernel", "group")
AXES: dict[str, list[Any]] = {"train.momentum": [0.0, 0.9], "model.final_norm": ["none", "kernel"]}


def value(name: str, size: int, point: Mapping[str, Any], seed: int) -> float:
    """Final norm +4 points, with kernel 2 more; momentum does nothing."""
    kernel, norm = name == "kernel", point.get("model.final_norm") == "kernel"
    noise = 0.004 * numpy_generator(seed, name, size, repr(sorted(point.items()))).normal()
    luck = 0.03 * numpy_generator(seed, "luck").normal()
    return float(0.6 + 0.04 * norm + 0.02 * (kernel and norm) + 0.01 * (size == 8) + luck + noise)


def fitted() -> dict[tuple[str, ...], list[float]]:
    """By effect its size for each seed: twice the coefficients of a fit on plus and minus 1."""
    levels = {
        "normalizer": NAMES,
        "batch size": (2, 8),
        **{key: tuple(values) for key, values in AXES.items()},
    }
    names = list(levels)
    cells = list(product(*levels.values()))
    signs = np.array(
        [[1.0 if v == levels[n][0] else -1.0 for n, v in zip(names, c, strict=True)] for c in cells]
    )
    terms = [*((i,) for i in range(len(names))), *combinations(range(len(names)), 2)]
    columns = np.column_stack(
        [np.ones(len(cells)), *(signs[:, list(term)].prod(axis=1) for term in terms)]
    )
    found: dict[tuple[str, ...], list[float]] = {}
    for seed in SEEDS:
        y = [value(n, s, dict(zip(AXES, point, strict=True)), seed) for n, s, *point in cells]
        coefficients = np.linalg.lstsq(columns, np.array(y), rcond=None)[0][1:]
        for term, coefficient in zip(terms, coefficients, strict=True):
            found.setdefault(tuple(names[i] for i in term), []).append(2 * float(coefficient))
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return made_run(tmp_path / "r", value, seeds=SEEDS, batch_sizes=(2, 8), axes=AXES)


def effects(run: RunFolder) -> dict[tuple[str, ...], Effect]:
    (summary,) = summarize([run])
    return {effect.of: effect for effect in summary.effects}


def test_effects_are_those_of_a_regression_and_tested_over_the_seeds(run: RunFolder) -> None:
    expected = fitted()
    found = effects(run)
    assert list(found) == list(expected)
    p_values = {of: float(stats.ttest_1samp(by_seed, 0).pvalue) for of, by_seed in expected.items()}
    for of, by_seed in expected.items():
        test = found[of].comparison
        assert test.n == len(SEEDS)
        assert test.difference == pytest.approx(abs(np.mean(by_seed)), rel=1e-9)
        assert test.p == pytest.approx(p_values[of], rel=1e-6)
        width = stats.t.ppf(0.975, len(SEEDS) - 1) * np.std(by_seed, ddof=1) / len(SEEDS) ** 0.5
        assert test.half_width == pytest.approx(width, rel=1e-6)
        assert found[of].cells == 8
    smallest = min(p_values, key=lambda of: p_values[of])
    assert found[smallest].comparison.p_holm == pytest.approx(p_values[smallest] * len(expected))


def test_who_is_better_is_named_by_its_value(run: RunFolder) -> None:
    found = effects(run)
    norm = found["model.final_norm",].comparison
    assert (norm.first, norm.second, norm.significant) == ("kernel", "none", True)
    together = found["normalizer", "model.final_norm"].comparison
    # Half of the two points that the final norm is worth more under kernel.
    assert together.difference == pytest.approx(0.01, abs=0.003)
    assert together.first == "kernel with kernel, group with none"
    assert not found["train.momentum",].comparison.significant


def test_of_a_metric_where_less_is_better_less_is_ahead(tmp_path: Path) -> None:
    metric = Metric("rmse", higher_is_better=False, lowest=0.0, highest=math.inf)
    run = made_run(tmp_path / "r", value, seeds=SEEDS, axes=AXES, metric=metric)
    norm = effects(run)["model.final_norm",].comparison
    assert (norm.first, norm.second) == ("none", "kernel")


def test_of_several_values_all_pairs_and_no_interaction(tmp_path: Path) -> None:
    run = made_run(tmp_path / "r", value, seeds=SEEDS, batch_sizes=(2, 4, 8), axes=AXES)
    (summary,) = summarize([run])
    sizes = [e for e in summary.effects if e.of == ("batch size",)]
    assert {frozenset((e.comparison.first, e.comparison.second)) for e in sizes} == {
        frozenset(pair) for pair in combinations(("2", "4", "8"), 2)
    }
    assert {e.cells for e in sizes} == {8}
    assert not any("batch size" in e.of for e in summary.effects if len(e.of) > 1)


def test_where_one_thing_varies_or_a_combination_is_missing_there_are_none(tmp_path: Path) -> None:
    one = made_run(tmp_path / "one", value, seeds=SEEDS)
    assert effects(one) == {}
    run = made_run(tmp_path / "r", value, seeds=SEEDS, axes=AXES)
    path = run.path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    of_last = list(dict.fromkeys(json.loads(line)["cell"] for line in lines))[-len(SEEDS) :]

    def without(cells: Sequence[str]) -> RunFolder:
        path.write_text("".join(f"{x}\n" for x in lines if json.loads(x)["cell"] not in cells))
        return RunFolder.open(run.path)

    # That combination has its other seeds: the effects are over those.
    found = effects(without(of_last[:1]))
    assert {effect.comparison.n for effect in found.values()} == {len(SEEDS) - 1}
    assert effects(without(of_last)) == {}


def test_verdict_page_json_and_markdown_have_them(run: RunFolder, tmp_path: Path) -> None:
    digest = summary_dict(run)
    (sentence,) = (text for text in digest["axis_verdicts"] if "veraged over all else" in text)
    assert "model.final_norm kernel is ahead of none by 5" in sentence
    assert "none is shown" in sentence
    told = {tuple(of["of"]): of for of in digest["effects"]}
    assert told["model.final_norm",]["ahead"] == "kernel"
    assert told["model.final_norm",]["cells"] == 8
    page = build_report(run).read_text(encoding="utf-8")
    assert "What each setting is worth" in page
    assert "normalizer and model.final_norm" in page
    text = blocks(overview(collect(tmp_path)))["r"]
    assert "| model.final\\_norm | kernel | none | **" in text
    assert text.count("| all else |") == 1
