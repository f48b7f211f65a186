from __future__ import annotations

import json
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

    def run(python: str, name: str, path: Path, config: ExperimentConfig, allocator: bool):
        assert json.loads(path.read_text())["device"] == config.device
        asked.append((name, config.device))
        return engines._Run(1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(engines, "_run", run)
    settings = {"repetitions": 1, "allocator_for_all": False, "workers": 1, "progress": str}
    rows = engines.engine_rows(
        ["small"], ["auto", "loop-1"], pfl_folder=None, device="cuda:0", **settings
    )
    assert asked == [("auto", "cuda:0"), ("loop-1", "cuda:0")]
    assert [row.contender for row in rows] == ["auto", "loop-1"]
    with pytest.raises(UserError, match="pfl-research is measured on the CPU"):
        engines.engine_rows(
            ["small"], ["pfl-1"], pfl_folder=Path("nowhere"), device="cuda", **settings
        )
