"""`fedkn bench gpu` runs the first time: all that it does but the device itself, on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from simulations.benchmarks.engine_tasks import Task
from simulations.benchmarks.gpu import convolutions, everything, local_steps
from simulations.benchmarks.gpu.checks import check_normalizer
from simulations.benchmarks.gpu.convolutions import ConvolutionCase
from simulations.benchmarks.gpu.everything import measure_everything
from simulations.benchmarks.gpu.local_steps import StepCase, measure_steps, step_cases
from simulations.benchmarks.gpu.networks import NetworkCase, NetworkTime, network_cases
from simulations.benchmarks.gpu.page import Results
from simulations.benchmarks.gpu.rounds import RoundCase, measure_rounds, round_cases
from simulations.cli import app

CPU = torch.device("cpu")


@pytest.mark.parametrize("way", ["sequential", "stacked", "concurrent"])
def test_steps_of_every_way_are_timed(way: str) -> None:
    taken = measure_steps(StepCase(way, "kernel", 4, 2, 3), CPU, steps=2, side=8, repetitions=1)
    assert taken.milliseconds > 0
    assert taken.each == pytest.approx(taken.milliseconds / 3)


@pytest.mark.parametrize("name", ["kernel", "batch"])
def test_checks_hold_on_the_cpu_itself(name: str) -> None:
    check = check_normalizer(name, CPU, width=4, side=8)
    assert check.repeats
    assert check.concurrent
    assert not check.waits
    assert not check.recorded  # nothing is, without a device
    assert check.difference == 0.0


def test_convolutions_are_timed_in_all_three_ways(monkeypatch) -> None:
    case = ConvolutionCase(2, 1, 3, 4, 6)
    monkeypatch.setattr(
        convolutions,
        "convolve_stacked",
        lambda x, w, bias, geometry: torch.func.vmap(
            lambda maps, filters: torch.conv2d(maps, filters, bias, padding=1)
        )(x, w),
    )
    taken = convolutions.measure_convolution(case, CPU)
    assert min(taken.own, taken.grouped, taken.grouped_tf32) > 0
    assert "| 2 | 1 | 3 | 4 | 6 |" in Results(convolutions=[taken]).page()


def test_rounds_are_those_of_the_metrics_log() -> None:
    settings = {"cohort": 2, "train.local_steps": 1, "model.width": 4, "engine": "inprocess"}
    case = RoundCase("small", Task("small", 4, 4, 4, settings))
    taken = measure_rounds(case, "cpu")
    assert taken.client_steps == 2
    assert 0 < taken.round_seconds < taken.total_seconds


def test_every_case_can_be_made() -> None:
    for quick in (True, False):
        assert len({str(case) for case in step_cases(quick)}) > 10
        assert {case.precision for case in network_cases(quick)} == {"tf32", "float32", "bfloat16"}
        assert any("batch" in case.title for case in round_cases(quick))
    assert all(case.batch for case in step_cases(False))


def test_one_failing_case_costs_no_other(monkeypatch) -> None:
    def failing(case, device):
        if case.way == "stacked":
            raise RuntimeError("out of luck\nand more")
        return local_steps.StepTime(case, 1.0, 1.0 / case.clients, 0.1, 5.0)

    monkeypatch.setattr(everything, "measure_steps", failing)
    seen: list[int] = []
    results = measure_everything(
        CPU, parts=["steps"], quick=True, done=lambda r: seen.append(len(r.steps))
    )
    assert results.steps
    assert all(reason == "RuntimeError: out of luck" for _, reason in results.failed)
    assert len(seen) == len(results.steps) + len(results.failed)
    assert "FAILED StepCase(way='stacked'" in results.page()
    late = measure_everything(CPU, parts=["steps"], quick=True, seconds=-1.0)
    assert not late.steps
    assert "not begun" in late.failed[0][1]


def test_ratios_of_networks_are_to_the_best_batch_norm() -> None:
    times = [
        NetworkTime(NetworkCase("batch", 2, "float32"), 9.0, 2.0, 10.0),
        NetworkTime(NetworkCase("batch", 2, "float32", channels_last=False), 9.0, 4.0, 10.0),
        NetworkTime(NetworkCase("kernel", 2, "float32"), 9.0, 3.0, 8.0),
    ]
    page = Results(networks=times).page()
    assert "| kernel | channels last | 9.00 | 3.00 | 1.50 |" in page
    assert "| batch | contiguous | 9.00 | 4.00 | 2.00 |" in page
    assert json.loads(Results(networks=times).as_json())["networks"][0]["eager"] == 9.0


def test_the_command_wants_a_gpu(tmp_path) -> None:
    result = CliRunner().invoke(app, ["bench", "gpu", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code != 0
