"""What is drawn is what was measured: from the figures' numbers, and read back from the SVG."""

import base64
import io
import math
import re
from collections.abc import Mapping
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from fedkn.tasks.metric import ACCURACY, Metric
from simulations.report import figures, pictures
from simulations.report.chart import Scale
from simulations.report.curves import loss_limits, value_limits
from simulations.runs.records import PartitionRecord
from simulations.runs.statistics import mean_interval

RMSE = Metric("rmse", higher_is_better=False, lowest=0.0, unit="mm")


def svg(text: str) -> ET.Element:
    return ET.fromstring(text)


def titles(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter("title")]


def final(name: str, by_seed: Mapping[int, float]) -> figures.Finals:
    return figures.Finals(name, name, by_seed, mean_interval(list(by_seed.values()), 0, 1))


def test_a_curve_has_every_seed_its_mean_and_its_interval_within_the_possible() -> None:
    seeds = [{0: 0.1, 1: 0.98}, {0: 0.1, 1: 0.90}, {0: 0.2, 1: 1.0, 2: 0.5}]
    curve = figures.curve_of(seeds, ACCURACY)
    assert curve.rounds == [0, 1, 2]
    assert curve.seeds == [[0.1, 0.1, 0.2], [0.98, 0.90, 1.0], [0.5]]
    assert curve.mean == pytest.approx([0.4 / 3, 0.96, 0.5])
    low, _ = stats.t.interval(0.95, 2, 0.96, stats.sem([0.98, 0.90, 1.0]))
    assert curve.low[1] == pytest.approx(low)
    assert curve.high[1] == 1.0
    assert math.isnan(curve.low[2])
    assert curve.low[0] == 0.0


def test_a_value_that_is_no_number_is_not_drawn() -> None:
    curve = figures.curve_of([{1: math.nan}, {1: math.inf}, {1: 0.5}], ACCURACY)
    assert (curve.mean, curve.seeds) == ([0.5], [[0.5]])
    lines = figures.Lines.of({"kernel": [{1: math.nan}]}, ACCURACY)
    assert "nan" not in figures.learning_curves(lines, (0, 1), "x").replace("nan%", "")


def test_finals_show_each_seed_beside_the_interval() -> None:
    finals = [final("kernel", {0: 0.99, 1: 0.95, 7: 1.0}), final("none", {0: 0.3})]
    limits = figures.final_limits(finals, ACCURACY)
    assert limits[1] == 1.0
    assert limits[0] < 0.3
    root = svg(figures.final_values(finals, limits, ACCURACY, "results"))
    told = titles(root)
    for seed, value in ((0, "99.0%"), (1, "95.0%"), (7, "100.0%")):
        assert f"kernel, seed {seed}: {value}" in told
    assert "none, seed 0: 30.0%" in told
    assert len([e for e in root.iter() if (e.get("class") or "").startswith("interval")]) == 3
    assert root.get("aria-label", "").startswith("results: kernel 98.0% (91.4 to 100.0)")


def test_marks_lie_where_their_values_are() -> None:
    finals = [final("kernel", {0: 0.2, 1: 0.6})]
    root = svg(figures.final_values(finals, (0.0, 1.0), ACCURACY, "results"))
    marks = [e for e in root.iter() if (e.get("class") or "").startswith("seed")]
    places = [float(re.findall(r"[-\d.]+", e.get("d") or f"{e.get('cx')}")[0]) for e in marks]
    ticks = [
        float(re.findall(r"[\d.]+", e.get("d") or "")[0])
        for e in root.iter("path")
        if e.get("class") == "grid"
    ]
    # 0, 20, … 100: two fifths of the axis lie between the seeds.
    assert places[1] - places[0] == pytest.approx(0.4 * (ticks[-1] - ticks[0]), abs=0.2)


def test_of_many_normalizers_intervals_and_seeds_are_left_out() -> None:
    many = {f"n{i}": [{1: 0.1 * i, 2: 0.1}, {1: 0.2, 2: 0.3}] for i in range(figures.FEW + 1)}
    crowded = figures.learning_curves(figures.Lines.of(many, ACCURACY), (0, 1), "x")
    few = dict(list(many.items())[: figures.FEW])
    clear = figures.learning_curves(figures.Lines.of(few, ACCURACY), (0, 1), "x")
    assert 'class="seed' not in crowded
    assert 'class="band' not in crowded
    assert clear.count('class="band') == figures.FEW
    assert 'class="seed' in clear


def test_units_are_those_of_the_metric() -> None:
    lines = figures.Lines.of({"kernel": [{1: 2.5, 2: 1.5}]}, RMSE)
    drawn = figures.learning_curves(lines, (1.0, 3.0), "curves")
    assert ">rmse (mm)</text>" in drawn
    assert "kernel 1.5 mm in round 2" in drawn
    assert ">accuracy (%)</text>" in figures.learning_curves(
        figures.Lines.of({"kernel": [{1: 0.5}]}, ACCURACY), (0, 1), "curves"
    )


def test_axes_end_where_values_do() -> None:
    curves = [{0: 0.0, 10: 0.97, 12: 1.0}]
    assert value_limits(curves, ACCURACY) == (pytest.approx(0.96), 1.0)
    assert value_limits([{0: 90.0, 9: 2.0, 12: 0.001}], RMSE)[0] == 0.0
    assert value_limits([], ACCURACY) == (0.0, 1.0)
    assert value_limits([], RMSE) == (0.0, 1.0)
    metric, limits = loss_limits([{9: -3.0, 12: -5.0}])
    assert metric.lowest == -math.inf
    assert limits[0] < -5
    metric, limits = loss_limits([{9: 3.0, 12: 0.5}])
    assert metric.lowest == 0
    assert 0 < limits[0] < 0.5


@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_round_and_lie_within_the_axis(log: bool) -> None:
    for low, high in ((0.0001, 0.0004), (0.02, 1.0), (3.0, 7e9), (0.9, 0.91), (1e-8, 1e8)):
        scale = Scale(low, high, 0, 100, log)
        ticks = scale.ticks()
        assert 1 < len(ticks) <= 8
        assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in ticks)
        assert all(len(f"{tick:g}") < 9 for tick in ticks)


def image(drawn: str) -> np.ndarray:
    data = re.search(r"base64,([^\"]+)", drawn)
    assert data
    return np.array(Image.open(io.BytesIO(base64.b64decode(data[1]))))[..., 3] / 255


def test_a_confusion_matrix_has_a_share_of_the_true_class_in_every_cell() -> None:
    counts = [[90, 10, 0], [0, 0, 0], [1, 2, 1]]
    drawn = pictures.confusion_picture(counts, ["a", "<b>", "c"], "confusions")
    shares = image(drawn) ** 2
    assert shares / shares[0, 0] * 0.9 == pytest.approx(
        np.array([[0.9, 0.1, 0], [0, 0, 0], [0.25, 0.5, 0.25]]), abs=0.01
    )
    texts = [e.text for e in svg(drawn).iter("text")]
    assert [text for text in texts if text in ("90", "10", "25", "50")] == [
        *("90", "10"),
        *("25", "50", "25"),
    ]
    assert "<b>" in texts


def test_a_picture_of_many_classes_stays_small_and_names_some() -> None:
    counts = np.random.default_rng(0).multinomial(50, np.full(300, 1 / 300), size=300)
    names = [f"class {i}" for i in range(300)]
    drawn = pictures.confusion_picture(counts.tolist(), names, "confusions")
    assert len(drawn) < 60_000
    named = {e.text for e in svg(drawn).iter("text")} & set(names)
    assert 10 < len(named) <= 24
    assert image(drawn).shape == (300, 300)


def test_classes_by_normalizer_and_who_holds_what() -> None:
    values = np.array([[1.0, 0.5], [np.nan, 0.0]])
    drawn = pictures.class_picture(values, ["kernel", "none"], ["x", "y"], "classes")
    alpha = image(drawn)
    assert alpha / alpha[0, 0] == pytest.approx(np.array([[1, 0.5], [0, 0]]), abs=0.01)
    assert [e.text for e in svg(drawn).iter("text")][:3] == ["100", "50", "0"]
    record = PartitionRecord("iid", 0, ["x", "y"], [[4, 0], [16, 1], [0, 0]])
    alpha = image(pictures.partition_picture(record))
    assert alpha / alpha[0, 1] == pytest.approx(np.sqrt([[4, 16, 0], [0, 1, 0]]) / 4, abs=0.01)
