"""`fedkn bench gpu` runs the first time: all that it does but the device itself, on the CPU."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from fedkn import normalizers
from simulations.benchmarks.gpu import device as device_module
from simulations.benchmarks.gpu.cases import PARTS, Part
from simulations.benchmarks.gpu.checks import CheckCase, check_normalizer
from simulations.benchmarks.gpu.convolutions import ConvolutionCase, ConvolutionTime
from simulations.benchmarks.gpu.device import Gpu
from simulations.benchmarks.gpu.device_tests import MarkedFile, marked_files, run_marked
from simulations.benchmarks.gpu.everything import measure_everything
from simulations.benchmarks.gpu.layers import LayerCase, LayerTime
from simulations.benchmarks.gpu.local_steps import StepCase, step_cases
from simulations.benchmarks.gpu.networks import NetworkCase, NetworkTime, network_cases
from simulations.benchmarks.gpu.page import Failure, Results
from simulations.benchmarks.gpu.process import MeasuringProcess
from simulations.benchmarks.gpu.rounds import round_cases
from simulations.cli import app
from tests.simulations.benchmarks.stand_in import StandIn, kind, small


@pytest.fixture
def marked(tmp_path: Path) -> MarkedFile:
    path = tmp_path / "test_device.py"
    path.write_text(
        "import pytest\n\n@pytest.mark.gpu\ndef test_it() -> None:\n    assert True\n"
        "\n\ndef test_another() -> None:\n    assert False\n"
    )
    return MarkedFile(str(path))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, marked: MarkedFile):
    """Return the command with a double of the device; `every` case of it, or one of each kind."""

    def run(*options: str, every: bool) -> dict[str, Any]:
        for name, part in PARTS.items():
            cases = list(part.cases()) if name != "tests" else [marked]
            if not every:
                cases = list({kind(case): case for case in reversed(cases)}.values())
            made = tuple(map(small, cases))
            monkeypatch.setitem(PARTS, name, replace(part, cases=lambda made=made: made))
        # However busy this machine is.
        monkeypatch.setattr("simulations.benchmarks.gpu.everything._LONGEST_CASE", 600.0)
        monkeypatch.setattr("simulations.benchmarks.gpu.process._STARTS", 600.0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(device_module, "Gpu", lambda name: StandIn(tmp_path))
        result = CliRunner().invoke(
            app,
            [
                "bench",
                "gpu",
                "--device",
                "cuda",
                "--out",
                str(tmp_path / "out"),
                "--json",
                *options,
            ],
            catch_exceptions=False,
        )
        assert result.exit_code == 0, result.output
        content = json.loads((tmp_path / "out" / "gpu.json").read_text())
        assert json.loads(result.stdout) == content
        assert content["failed"] == []
        for name, part in PARTS.items():
            assert len(content[name]) == len(list(part.cases())), name
        return content

    return run


def test_the_whole_command_goes_through_every_part(command, tmp_path: Path) -> None:
    content = command("--seconds", "5000", every=False)
    assert content["benchmark"] == "gpu"
    assert content["machine"]["gpu"] == "stand-in"
    assert content["machine"]["torch"] == torch.__version__
    assert {check["recorded"] for check in content["checks"]} == {True}
    assert all(check["repeats"] and check["concurrent"] for check in content["checks"])
    assert {check["waits"] for check in content["checks"]} == {""}
    for step in content["steps"]:
        assert step["milliseconds"] == pytest.approx(step["each"] * step["case"]["clients"])
        assert step["peak_mib"] == 77.0
    assert {step["case"]["way"] for step in content["steps"]} == {
        "sequential",
        "stacked",
        "concurrent",
    }
    # What `auto` takes on the CPU, where the stand-in computes; on a GPU it is "batched".
    assert {row["engine"] for row in content["rounds"]} == {"inprocess"}
    for row in content["rounds"]:
        assert 0 < row["round_seconds"] < row["total_seconds"]
        assert 0 < row["wall_seconds"] < row["total_seconds"]
        assert row["client_steps"] == 4
    assert {row["case"]["precision"] for row in content["networks"]} == {
        "tf32",
        "float32",
        "bfloat16",
    }
    for row in content["layers"]:
        assert list(row["shares"]) == ["channel_sums", "epilogue", "reduce_gradient"]
        numbers = row["case"]["batch"] * row["case"]["channels"] * row["case"]["side"] ** 2
        # 4 bytes a number, read once in 2 microseconds; the copy's bytes a nanosecond.
        assert row["shares"]["channel_sums"] == pytest.approx(4 * numbers / 2e3 / row["gigabytes"])
    assert [row["passed"] for row in content["tests"]] == [True]
    assert "1 passed" in content["tests"][0]["summary"]
    assert set(content["took"]) == set(PARTS)
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert page.startswith("stand-in, torch ")
    assert sum(line.startswith("| ---") for line in page.splitlines()) == len(PARTS)
    assert len(list(tmp_path.glob("process-*"))) == 1, "a process for all that goes well"


@pytest.mark.slow
def test_the_whole_command_goes_through_every_case(command) -> None:
    content = command("--seconds", "9000", every=True)
    assert all(check["repeats"] and check["concurrent"] for check in content["checks"])


REACHED = (
    "current_device", "device_count", "empty_cache", "get_device_name", "get_device_properties",
    "is_available", "is_initialized", "max_memory_allocated", "max_memory_reserved",
    "mem_get_info", "memory_allocated", "reset_peak_memory_stats", "set_device",
    "set_sync_debug_mode",
    "synchronize", "Stream", "CUDAGraph", "graph", "stream", "current_stream",
)  # fmt: skip


def test_pytorch_has_what_only_a_device_would_reach() -> None:
    assert [name for name in REACHED if not hasattr(torch.cuda, name)] == []
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        torch.ones(3).add_(1)
    events = recorded.key_averages()
    assert all(event.key and event.self_device_time_total == 0 for event in events)
    assert isinstance(ProfilerActivity.CUDA, ProfilerActivity)


def test_every_case_has_a_name_of_its_own_and_those_with_a_goal_come_first() -> None:
    for name, part in PARTS.items():
        cases = list(part.cases())
        assert len(set(map(str, cases))) == len(cases), name
    first = [(case.normalizer, case.way) for case in list(step_cases())[:4]]
    assert first == [
        ("kernel", "stacked"),
        ("group", "stacked"),
        ("batch", "concurrent"),
        ("none", "stacked"),
    ]
    steps = {(c.normalizer, c.width, c.clients) for c in step_cases()}
    assert {
        (name, width, clients)
        for name in ("kernel", "group", "batch", "none")
        for width in (16, 64)
        for clients in (1, 16, 64, 256)
    } <= steps
    assert {(c.normalizer, c.batch, c.precision) for c in list(network_cases())[:4]} == {
        (name, 2, precision) for name in ("batch", "kernel") for precision in ("tf32", "bfloat16")
    }
    titles = [case.title for case in round_cases()]
    assert all(sum(t.endswith(f" {name}") for t in titles) == 1 for name in normalizers.names())
    assert sum(part.share for part in PARTS.values()) == pytest.approx(1.0)


def test_the_checkouts_own_tests_are_found_and_their_failures_told(tmp_path: Path) -> None:
    found = {file.path for file in marked_files()}
    assert "tests/fedkn/layers/kernel/backends/test_triton.py" in found
    path = tmp_path / "test_failing.py"
    path.write_text("import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    assert 1 == 2\n")
    outcome = run_marked(MarkedFile(str(path)), StandIn(tmp_path))
    assert not outcome.passed
    assert "test_it" in outcome.summary
    assert "1 failed" in outcome.summary


def test_tests_that_take_too_long_are_told_as_far_as_they_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Far more than pytest takes to start, on a busy machine too.
    monkeypatch.setattr("simulations.benchmarks.gpu.device_tests._LIMIT", 20.0)
    path = tmp_path / "test_slow.py"
    path.write_text(
        "import time\nimport pytest\n\npytestmark = pytest.mark.gpu\n\n"
        "def test_good(): pass\n\ndef test_bad(): assert False\n\n"
        "def test_slow(): time.sleep(600)\n"
    )
    outcome = run_marked(MarkedFile(str(path)), StandIn(tmp_path))
    assert not outcome.passed
    assert outcome.summary.startswith("FAILED ")
    assert outcome.summary.endswith("::test_bad; 1 passed, then 20 s were over")


@pytest.mark.parametrize("name", ["kernel", "batch"])
def test_checks_hold_on_the_cpu_itself(name: str, tmp_path: Path) -> None:
    check = check_normalizer(CheckCase(name, 4, 8), StandIn(tmp_path))
    assert check.repeats
    assert check.concurrent
    assert check.difference == 0.0
    assert not check.waits


def misbehaving(case: str, device: Gpu) -> Failure:
    match case:
        case "raises":
            raise RuntimeError("out of luck\nand more")
        case "says nothing":
            raise RuntimeError
        case "dies":
            os._exit(3)
        case "hangs":
            time.sleep(600)
        case "spoils the device":
            device.wait = _spoilt  # type: ignore[method-assign]
    return Failure("checks", case, "")


def _spoilt() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_case_that_fails_dies_or_hangs_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = (
        "first",
        "raises",
        "says nothing",
        "dies",
        "second",
        "hangs",
        "spoils the device",
        "last",
    )
    measure = MeasuringProcess.measure

    def patient(process: MeasuringProcess, of: Any, case: str) -> Any:
        # However busy this machine is: only the one that hangs has little time.
        process._longest = 3.0 if case == "hangs" else 600.0
        return measure(process, of, case)

    monkeypatch.setattr(MeasuringProcess, "measure", patient)
    monkeypatch.setattr("simulations.benchmarks.gpu.process._STARTS", 600.0)
    seen: list[tuple[int, int]] = []
    results = measure_everything(
        StandIn(tmp_path),
        parts=["checks"],
        seconds=5000.0,
        done=lambda r: seen.append((len(r.checks), len(r.failed))),
        table={"checks": Part(lambda: cases, misbehaving, 1.0)},
    )
    assert [of.case for of in results.checks] == ["first", "second", "spoils the device", "last"]
    assert {of.case: of.reason for of in results.failed} == {
        "raises": "RuntimeError: out of luck",
        "says nothing": "RuntimeError: ",
        "dies": "its process ended with code 3",
        "hangs": "it did not end within 3 s",
    }
    # One to begin with, one after the death, the kill and the spoilt device each.
    assert len(list(tmp_path.glob("process-*"))) == 4
    assert [sum(counts) for counts in seen] == [1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_it_ends_in_time_and_what_a_part_has_no_time_for_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(float(tick) for tick in range(10_000))
    monkeypatch.setattr("simulations.benchmarks.gpu.everything.time.monotonic", lambda: next(clock))
    order: list[str] = []

    class Process:
        def __init__(self, device: Gpu, *, end: float, longest: float) -> None:
            assert min(end, longest) > 0

        def machine(self) -> dict[str, Any]:
            return {}

        def measure(self, measure: Any, case: str) -> Failure:
            order.append(case)
            return Failure("", case, "")

        def close(self) -> None:
            order.append("closed")

    monkeypatch.setattr("simulations.benchmarks.gpu.everything.MeasuringProcess", Process)
    table = {
        "checks": Part(lambda: [f"c{i}" for i in range(30)], misbehaving, 0.5),
        "steps": Part(lambda: ["s0", "s1"], misbehaving, 0.5),
    }
    results = measure_everything(
        StandIn(tmp_path), parts=["checks", "steps"], seconds=60.0, table=table
    )
    first = order.index("s0")
    assert 2 < first < 20, "the first part had half of the time"
    assert order[first : first + 2] == ["s0", "s1"]
    assert order[first + 2] == f"c{first}", "then it went on where it had stopped"
    assert order[-1] == "closed"
    missing = [of.case for of in results.failed]
    assert missing
    assert {of.reason for of in results.failed} == {"there was no time left for it in 60 s"}
    assert sorted(missing + order[:-1]) == sorted([*table["checks"].cases(), "s0", "s1"])


def test_a_device_that_cannot_be_opened_is_told_of_every_case(tmp_path: Path) -> None:
    results = measure_everything(
        Broken(tmp_path),
        parts=["checks"],
        seconds=5000.0,
        table={"checks": Part(lambda: ["a"], misbehaving, 1.0)},
    )
    assert [of.part for of in results.failed] == ["machine", "checks"]
    assert {of.reason for of in results.failed} == {"its process ended with code 1"}


class Broken(StandIn):
    def open(self) -> None:
        raise RuntimeError("no driver")


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


def test_the_page_has_what_was_measured_and_what_was_not() -> None:
    page = Results(
        layers=[LayerTime(LayerCase(2, 4, 6, True), 0.3, 0.2, 2999.0, {"epilogue": 0.954}, {})],
        convolutions=[ConvolutionTime(ConvolutionCase(64, 2, 3, 16, 32), 0.22, 0.67, 0.2)],
        failed=[Failure("steps", str(StepCase("stacked", "kernel", 16, 2, 64)), "a | b")],
        took={"steps": 3.4},
        seconds=420.0,
    ).page()
    assert "| 2x4x6x6 | channels last | 0.05 | 0.300 | 0.200 | 1.50 | 2999 | epilogue 95% |" in page
    assert "| 64 | 2 | 3 | 16 | 32 | 0.220 | 0.670 | 0.200 |" in page
    assert "FAILED steps: 64 x kernel, stacked, width 16, batch 2: a | b" in page
    assert page.endswith("Seconds: steps 3, of 420.\n")


def test_the_command_wants_a_gpu(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "gpu", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code != 0
