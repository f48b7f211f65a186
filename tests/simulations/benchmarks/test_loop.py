from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.layers import dropout_stream
from fedkn.layers.native import library
from fedkn.models import build
from fedkn.normalizers import create
from simulations.benchmarks import engines, loop
from simulations.benchmarks.engine_tasks import Task, prepared
from simulations.benchmarks.loop import written_by_hand


@pytest.mark.parametrize("model", ["convnet3", "resnet8"])
@pytest.mark.parametrize("normalizer", ["group", "kernel"])
def test_a_model_written_by_hand_computes_the_same_by_pytorchs_own_layers(model, normalizer):
    ours, theirs = (
        build(model, num_classes=10, in_channels=3, width=8, normalizer=create(normalizer)).to(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    theirs = written_by_hand(theirs)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    results = []
    for network, given in ((ours, x.contiguous(memory_format=torch.channels_last)), (theirs, x)):
        with dropout_stream(3):
            results.append(network(given))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert all(p.is_contiguous() for p in theirs.parameters())
    if normalizer == "group":
        with mock.patch.object(library, "takes", side_effect=AssertionError):
            theirs(x)


@pytest.fixture
def task(tmp_path: Path) -> ExperimentConfig:
    settings = {"cohort": 3, "model.width": 4, "train.batch_size": 4}
    return prepared(Task("small", 5, 8, 2, settings), tmp_path)


def test_the_loop_trains_every_round_and_in_the_layout_of_gpus_alike(
    task: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    loop.run_loop(task, 1, lambda: ended.append(1))
    assert len(ended) == task.rounds
    sums = []
    for layout in (torch.contiguous_format, torch.channels_last):
        monkeypatch.setattr(loop, "_layout", lambda device, layout=layout: layout)
        trainer = loop._Trainer(task)
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        assert any(p.is_contiguous(memory_format=layout) for p in trainer.model.parameters())
        torch.manual_seed(0)
        found, count = trainer.train(weights, [0, 3])
        assert count == 16
        assert not any(torch.equal(found[name], value * count) for name, value in weights.items())
        sums.append(found)
    for name, value in sums[0].items():
        torch.testing.assert_close(sums[1][name], value, rtol=1e-4, atol=1e-4)


def test_all_contenders_compute_on_the_device_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str]] = []

    def run(python: str, name: str, path: Path, config: ExperimentConfig, *more: object):
        assert json.loads(path.read_text())["device"] == config.device
        asked.append((name, config.device))
        return engines._Run(1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(engines, "_run", run)
    settings = {"repetitions": 1, "allocator_for_all": False, "workers": 1, "progress": str}
    results = engines.measure_engines(
        ["small"], ["auto", "loop-1"], pfl_folder=None, device="cuda:0", **settings
    )
    assert asked == [("auto", "cuda:0"), ("loop-1", "cuda:0")]
    assert [row.contender for row in results.rows] == ["auto", "loop-1"]
    with pytest.raises(UserError, match="pfl-research is measured on the CPU"):
        engines.measure_engines(
            ["small"], ["pfl-1"], pfl_folder=Path("nowhere"), device="cuda", **settings
        )


def test_a_contender_that_fails_or_a_time_that_is_over_loses_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = {"now": 0.0}
    asked: list[tuple[str, str]] = []

    def run(python: str, name: str, path: Path, config: ExperimentConfig, *more: float):
        asked.append((path.stem, name))
        if more[-1] <= 0:
            raise engines._ContenderFailedError("there was no time left for it")
        clock["now"] += 10.0
        if (path.stem, name) == ("small", "auto"):
            raise engines._ContenderFailedError("an illegal memory access")
        return engines._Run(2.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(engines, "_run", run)
    monkeypatch.setattr(engines.time, "monotonic", lambda: clock["now"])
    seen: list[int] = []
    results = engines.measure_engines(
        ["small", "fixed"],
        ["auto", "loop-1"],
        repetitions=2,
        allocator_for_all=False,
        workers=1,
        pfl_folder=None,
        progress=str,
        device="cuda",
        seconds=55.0,
        done=lambda found: seen.append(len(found.rows)),
    )
    assert asked[:4] == [
        ("small", "auto"), ("small", "loop-1"), ("fixed", "auto"), ("fixed", "loop-1"),
    ]  # fmt: skip
    assert ("small", "auto") not in asked[1:], "it has failed there"
    assert seen == [0, 1, 2, 3, 3, 3, 3]
    found = {(row.task, row.contender): row.ratio for row in results.rows}
    assert found == {("small", "loop-1"): None, ("fixed", "auto"): 1.0, ("fixed", "loop-1"): 1.0}
    assert [(of.task, of.contender) for of in results.failed] == [
        ("small", "auto"),
        ("fixed", "auto"),
    ]
    content = json.loads(engines.engines_json(results, {}))
    assert [of["reason"] for of in content["failed"]] == [
        "an illegal memory access",
        "there was no time left for it",
    ]
    assert "FAILED small: auto: an illegal memory access" in str(
        engines.engines_table(results).caption
    )


def test_a_contender_that_does_not_run_says_why(task: ExperimentConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(task.overlay(model__width=0, rounds=2).flat() | {"nothing": 1}))
    with pytest.raises(engines._ContenderFailedError, match="nothing"):
        engines._run(sys.executable, "loop-1", path, task, False, 300.0)
    with pytest.raises(engines._ContenderFailedError, match="no time left"):
        engines._run(sys.executable, "loop-1", path, task, False, 0.0)
