from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedkn.layers import KNConv2d
from fedkn.layers.native import library
from fedkn.training.memory import peak_bytes, saved_activations
from simulations.benchmarks import timing
from simulations.benchmarks.layers import BASELINE, LayerShape, layer_rows
from simulations.benchmarks.models import Network, model_rows
from simulations.benchmarks.results import Row, as_json_text, plot, ratios, tables
from simulations.benchmarks.timing import Timing, time_in_turn
from simulations.benchmarks.unfolded import UnfoldedKNConv2d, unfolded

CPU = torch.device("cpu")


def test_cases_are_taken_in_turn_and_ratios_are_of_the_same_turn(monkeypatch):
    """On a clock that runs slower and slower, ratios of cases timed in turn stay what they are."""
    now, calls, slowdown = [0.0], [], [1.0]

    def case(name: str, seconds: float) -> None:
        calls.append(name)
        slowdown[0] *= 1.001
        now[0] += seconds * slowdown[0]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    cases = {"a": lambda: case("a", 0.02), "b": lambda: case("b", 0.06)}
    timings = time_in_turn(cases, repetitions=6, device=CPU)
    assert "".join(calls[-24:]) == "aabbbbaa" * 3
    assert timings["b"].ratio(timings["a"]) == pytest.approx(3, rel=0.01)
    assert timings["a"].seconds[-1] > timings["a"].seconds[0]


def test_short_cases_are_repeated_until_the_clock_can_tell(monkeypatch):
    now, count = [0.0], [0]

    def case() -> None:
        count[0] += 1
        now[0] += 0.001

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    timings = time_in_turn({"short": case}, repetitions=2, device=CPU)
    assert count[0] == 3 + 1 + 2 * (10 + 20)
    assert timings["short"].median == pytest.approx(0.001)


def test_a_case_does_not_pay_for_the_one_before(monkeypatch):
    now, last = [0.0], [""]

    def case(name: str) -> None:
        now[0] += 0.01 if name == last[0] else 0.03
        last[0] = name

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    cases = {"a": lambda: case("a"), "b": lambda: case("b")}
    timings = time_in_turn(cases, repetitions=3, device=CPU)
    assert all(seconds == pytest.approx(0.01) for seconds in timings["b"].seconds)


@settings(deadline=None, max_examples=15)
@given(
    channels=st.integers(1, 5),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    activation=st.sampled_from([None, "relu"]),
)
def test_the_unfolded_rival_computes_the_same_function(
    channels, kernel, stride, padding, activation
):
    torch.manual_seed(0)
    layer = KNConv2d(
        channels,
        3,
        kernel,
        stride=stride,
        padding=padding,
        dropout_p=0.0,
        activation=activation,
        dtype=torch.float64,
    )
    x = torch.randn(2, channels, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(UnfoldedKNConv2d(layer)(x), layer(x), rtol=1e-9, atol=1e-9)


def test_unfolded_replaces_every_layer_and_keeps_the_weights():
    model = nn.Sequential(KNConv2d(3, 4, 3), nn.Sequential(nn.ReLU(), KNConv2d(4, 2, 1)))
    weights = [p.data_ptr() for p in model.parameters()]
    changed = unfolded(model)
    assert not [m for m in changed.modules() if isinstance(m, KNConv2d)]
    assert [p.data_ptr() for p in changed.parameters()] == weights


def test_saved_activations_of_known_layers():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    map_ = 2 * 3 * 8 * 8 * 4
    assert saved_activations(nn.Sequential(nn.ReLU()), x) == map_
    # The convolution keeps its input, which is x itself, and its weights.
    assert saved_activations(nn.Conv2d(3, 3, 3, padding=1), x) == 0
    two = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    assert saved_activations(two, x) == map_


def test_peak_bytes_counts_what_is_alive_at_once():
    def step() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(3000)
        del first, second
        torch.zeros(2000)

    assert peak_bytes(step, CPU) == 4 * 4000


def test_rows_of_a_layer_and_a_model():
    rows = layer_rows(LayerShape(4, 6), 2, repetitions=1, device=CPU, channels_last=True)
    cases = {row.case: row for row in rows}
    assert cases[BASELINE].ratio == 1
    assert cases[BASELINE].saved_ratio == 1
    assert cases["KNConv, unfolded"].saved_ratio > 4 * cases["KNConv, plain"].saved_ratio
    assert all(row.milliseconds > 0 and row.peak_bytes > 0 for row in rows)
    rows = model_rows(
        Network("resnet8", 4),
        1,
        names=["batch", "kernel"],
        repetitions=1,
        device=CPU,
        channels_last=False,
        with_unfolded=True,
    )
    assert {"batch", "kernel, plain", "kernel, unfolded"} <= {row.case for row in rows}


def test_results_as_table_json_and_picture(tmp_path):
    rows = [Row("batch", "net", size, 2.0, 1.0, 100, 400, 1.0, 1.0) for size in (1, 2)] + [
        Row("kernel", "net", size, 1.0, size * 1.0, 50, 200, 0.5, 0.5) for size in (1, 2)
    ]
    assert ratios(rows)["kernel"]["time"] == pytest.approx(math.sqrt(2))
    assert ratios(rows)["kernel"]["saved_activations"] == pytest.approx(0.5)
    content = json.loads(as_json_text("models", rows, {"repetitions": 1}))
    assert len(content["rows"]) == 4
    assert content["machine"]["torch"] == torch.__version__
    assert [len(view.rows) for view in tables(rows, "batch")] == [2]
    plot(tmp_path / "picture.png", rows, "batch")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_case_that_keeps_nothing_has_no_ratio_of_memory():
    rows = [Row("conv", "net", 1, 2.0, 1.0, 0, 400, 0.0, 1.0)]
    assert "saved_activations" not in ratios(rows)["conv"]


def test_timing_ratio_is_the_median_of_pairs():
    assert Timing((2.0, 6.0, 9.0)).ratio(Timing((1.0, 2.0, 9.0))) == 2.0


def test_what_the_plain_path_keeps_is_not_taken_for_what_the_kernels_keep():
    if not library.load():
        pytest.skip("the fused CPU kernels cannot be built here")
    rows = {
        row.case: row
        for row in layer_rows(LayerShape(16, 8), 2, repetitions=1, device=CPU, channels_last=False)
    }
    # Its mask, in bits, where the kernels keep the sums of their 16 filters.
    extra = rows["KNConv, plain"].saved_bytes - rows["KNConv, native"].saved_bytes
    assert extra >= 2 * 16 * 8 * 8 // 8 - 16 * 4
