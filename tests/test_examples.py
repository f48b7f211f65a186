"""The examples run as they stand, and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import nn

import fedkn
from fedkn.data.vision import with_torchvision
from fedkn.experiment import federated_data, inputs_of
from fedkn.layers import KNConv2d
from fedkn.tasks import create
from fedkn.training import evaluate
from server.checkpoints import _read, weights_sha256
from simulations.runs.folder import RunFolder

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def ran(name: str, folder: Path, *arguments: str) -> tuple[str, fedkn.Result]:
    """Run an example in `folder`; return what it printed and its run."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    result = fedkn.load(run)
    assert result.failed == 0
    assert set(result.cells.status) == {"completed"}
    return done.stdout, result


def test_every_example_is_listed_and_run_here() -> None:
    files = {path.name for path in EXAMPLES.glob("*.py")}
    listed = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    assert files == listed
    here = Path(__file__).read_text()
    assert all(f'ran("{name}"' in here for name in files)


def test_own_observer(tmp_path: Path) -> None:
    printed, result = ran("own_observer.py", tmp_path)
    rows = [line.split(",") for line in (result.folder / "moved.csv").read_text().splitlines()]
    (cell,) = result.cells.cell
    assert [(name, int(round_)) for name, round_, _ in rows] == [(cell, n) for n in (1, 2, 3)]
    assert all(row[2] in printed for row in rows)
    # The last movement, from the checkpoints that are kept: those of the last two rounds.
    before, after = (
        _read(path)[0] for path in sorted((result.folder / "cells" / cell).glob("checkpoint-*"))
    )
    moved = [after.tensors[name].ravel() - before.tensors[name].ravel() for name in after.tensors]
    assert float(rows[-1][2]) == pytest.approx(np.linalg.norm(np.concatenate(moved)), rel=1e-6)
    network = result.model(cell)
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    assert weights_sha256(state) == weights_sha256(after.tensors)


def test_own_model(tmp_path: Path) -> None:
    _, result = ran("own_model.py", tmp_path)
    kernel, group = (result.model(f"{name}-b2-dirichlet0.3-s0") for name in ("kernel", "group"))
    assert type(kernel).__name__ == type(group).__name__ == "Net"
    for network, kind in ((kernel, KNConv2d), (group, nn.GroupNorm)):
        layers = list(network.modules())
        assert sum(isinstance(layer, kind) for layer in layers) == 2
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in layers)
    # Its option was passed on: 4 channels, not 8.
    assert group.features[0].out_channels == 4
    parameters = result.cells.set_index("normalizer").parameters
    for name, network in (("kernel", kernel), ("group", group)):
        assert parameters[name] == sum(p.numel() for p in network.parameters())


def test_own_normalizer(tmp_path: Path) -> None:
    _, result = ran("own_normalizer.py", tmp_path)
    trained = result.rounds[result.rounds["round"] > 0]
    batch, own = (trained[trained.cell.str.startswith(name)] for name in ("batch", "own_"))
    # Two clients of 33 images each round: every last one is trained on, or not.
    assert batch.examples.tolist() == [64, 64]
    assert own.examples.tolist() == [66, 66]


def test_own_data(tmp_path: Path) -> None:
    _, result = ran("own_data.py", tmp_path)
    import own_data

    whole = own_data.signals()
    assert whole["inputs"].dtype == np.float32
    (cell,) = RunFolder.open(result.folder).cells()
    data = federated_data(cell.config)
    assert data.train.inputs.dtype == torch.float32
    assert tuple(data.train.inputs.shape[1:]) == (2, 64)
    # Each client has examples of one device, and no two have the same.
    rows = {row.tobytes(): who for row, who in zip(whole["inputs"], whole["clients"], strict=True)}
    held = []
    for part in data.parts:
        owners = {rows[data.train.inputs[i].numpy().tobytes()] for i in part}
        assert len(owners) == 1
        held += owners
    assert sorted(held) == sorted({*whole["clients"]})
    # Better than saying the same of all.
    assert result.cells["value"].item() > 0.5


def test_own_task(tmp_path: Path) -> None:
    _, result = ran("own_task.py", tmp_path)
    cells = {cell.id: cell for cell in RunFolder.open(result.folder).cells()}
    for row in result.cells[result.cells.purpose == "result"].itertuples():
        config = cells[row.cell].config.overlay(device="cpu")
        test = federated_data(config).test
        with torch.inference_mode():
            outputs = result.model(row.cell)(inputs_of(config, torch.device("cpu"))(test.inputs))
        off = np.abs(outputs.numpy().astype(np.float64)[:, 0] - test.targets.numpy())
        assert row.metric == "within"
        assert row.value == np.mean(off < 1.0)
    rates = result.learning_rates
    for _, tried in rates.groupby("normalizer"):
        assert tried.value[tried.chosen].item() == tried.value.max()


def by_sklearn(task: str, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return what scikit-learn makes of a network's answers, for every metric of `task`."""
    if task == "regression":
        return {
            "rmse": np.sqrt(sk.mean_squared_error(targets, outputs)),
            "mae": sk.mean_absolute_error(targets, outputs),
            "r2": sk.r2_score(targets, outputs),
        }
    if task == "multilabel":
        answers = outputs > 0
        return {
            "micro_f1": sk.f1_score(targets, answers, average="micro"),
            "macro_f1": sk.f1_score(targets, answers, average="macro"),
            "subset_accuracy": sk.accuracy_score(targets, answers),
        }
    pixels, wanted = outputs.argmax(1).ravel(), targets.ravel()
    return {
        "mean_iou": sk.jaccard_score(wanted, pixels, average="macro"),
        "mean_dice": sk.f1_score(wanted, pixels, average="macro"),
        "pixel_accuracy": sk.accuracy_score(wanted, pixels),
    }


@pytest.mark.parametrize("task", ["regression", "multilabel", "segmentation"])
def test_other_tasks(task: str, tmp_path: Path) -> None:
    printed, result = ran("other_tasks.py", tmp_path, task)
    cells = {cell.id: cell for cell in RunFolder.open(result.folder).cells()}
    rows = [row for row in result.cells.itertuples() if row.purpose == "result"]
    assert {row.normalizer for row in rows} == {"kernel", "group"}
    for row in rows:
        config = cells[row.cell].config.overlay(device="cpu")
        test = federated_data(config).test
        network, answers = result.model(row.cell), []
        network.register_forward_hook(lambda *seen, to=answers: to.append(seen[-1]))
        scaled, size = inputs_of(config, torch.device("cpu")), config.evaluation.batch_size
        goal = create(task)
        found = evaluate(network, test.inputs, test.targets, scaled, size, goal=goal)
        outputs = torch.cat(answers).double().numpy()
        wanted = by_sklearn(task, outputs, test.targets.double().numpy())
        last = result.rounds[result.rounds.cell == row.cell].iloc[-1]
        assert found.metrics.keys() == wanted.keys()
        for metric, value in wanted.items():
            assert found.metrics[metric] == pytest.approx(value, rel=1e-12, abs=1e-12), metric
            # In the run's own process float32 sums of the network may be taken in another order.
            assert last[metric] == pytest.approx(value, rel=1e-6), metric
        assert row.metric == next(iter(wanted))
        assert row.value == last[row.metric]
    # The rate was chosen in the metric's own direction.
    best = "min" if task == "regression" else "max"
    for _, tried in result.learning_rates.groupby("normalizer"):
        assert len(tried) >= 2
        assert tried.value[tried.chosen].item() == getattr(tried.value, best)()
    assert rows[0].metric in printed
    assert rows[0].metric in result.report().read_text(encoding="utf-8")


def test_library_models(tmp_path: Path) -> None:
    _, result = ran("library_models.py", tmp_path)
    (cell, *_) = RunFolder.open(result.folder).cells()
    assert cell.config.partition.scheme == "natural"
    for name, kind in (("kernel", KNConv2d), ("group", nn.GroupNorm)):
        layers = list(result.model(f"{name}-b2-natural-s0").modules())
        assert type(layers[0]).__name__ == "MobileNetV3"
        assert any(isinstance(layer, kind) for layer in layers)
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in layers)


def test_library_models_of_timm(tmp_path: Path) -> None:
    with_torchvision(lambda: pytest.importorskip("timm"))
    import library_models

    photos = tmp_path / "photos"
    photos.mkdir()
    library_models.write_digits(photos, 90)
    data = library_models.photos(photos)
    assert data["inputs"].shape == (90, 3, 32, 32)
    result = fedkn.run(
        source="library_models:photos",
        root=str(photos),
        partition="natural",
        model="library_models:timm_model",
        normalizer="ws_group",
        batch_size=2,
        clients=3,
        cohort=3,
        rounds=1,
        train={"local_steps": 2},
        out=str(tmp_path / "run"),
        progress=False,
    )
    assert result.failed == 0
    layers = list(result.model().modules())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in layers)
