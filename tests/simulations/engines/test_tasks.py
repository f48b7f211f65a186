"""Tasks other than classification, and a user's own, in every engine and to the last line."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import build_model, federated_data, inputs_of, task_of
from fedkn.reference import federated_averaging
from simulations.comparison.grid import GridConfig
from simulations.comparison.preflight import check
from simulations.engines.run import run_experiment
from simulations.programs.trained_model import load_trained_model
from simulations.runs.flower_runs import open_run
from tests.simulations.engines import own_tasks

OWN = own_tasks.__name__


def experiment(source: str, task: str, model: str = "Dense", **changes: Any) -> ExperimentConfig:
    return ExperimentConfig.resolve(
        {
            "rounds": 3,
            "cohort": 4,
            "workers": 1,
            "engine": "inprocess",
            "device": "cpu",
            "data.source": f"{OWN}:{source}",
            "data.scaling": "none",
            "partition.scheme": "iid",
            "partition.clients": 5,
            "partition.minimum": 4,
            "model.name": f"{OWN}:{model}",
            "model.final_norm": "none",
            "normalizer.name": "none",
            "task.name": task,
            "train.batch_size": 3,
            "train.momentum": 0.5,
            "train.learning_rate": 0.02,
        },
        {key.replace("__", "."): value for key, value in changes.items()},
    )


CASES: dict[str, ExperimentConfig] = {
    "regression": experiment("numbers", "regression"),
    "regression of several numbers": experiment(
        "several_numbers", "regression", task__options='{"loss": "huber", "delta": 0.5}'
    ),
    "multilabel": experiment("labels", "multilabel"),
    "segmentation": experiment("masks", "segmentation", "Pixels"),
    "segmentation, flipped": experiment("masks", "segmentation", "Pixels", data__flip=True),
    "a task of one's own": experiment("numbers", f"{OWN}:Quantile", task__options='{"level": 0.7}'),
}


@pytest.mark.parametrize("name", CASES)
def test_every_engine_ends_in_the_weights_of_the_definition(name: str) -> None:
    config = CASES[name]
    wanted = federated_averaging(config)
    inprocess = run_experiment(config).arrays
    for tensor, value in wanted.items():
        assert inprocess[tensor].numpy().tobytes() == value.tobytes(), tensor
    batched = run_experiment(config.overlay(engine="batched")).arrays
    begun = build_model(config).state_dict()
    for tensor, value in wanted.items():
        np.testing.assert_allclose(batched[tensor].numpy(), value, rtol=1e-4, atol=1e-5)
        assert not np.array_equal(value, begun[tensor]), f"{tensor} was not trained"


def figures(config: ExperimentConfig, folder: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return the run's record, and targets and outputs of its final model on the test examples."""
    outcome = run_experiment(config.overlay(checkpoint__folder=str(folder)))
    (cell,) = open_run(folder).cells()
    assert cell.values("test")[config.rounds] == outcome.value
    model, test = build_model(config).eval(), federated_data(config).test
    model.load_state_dict(
        {n: torch.from_numpy(outcome.arrays[n].numpy().copy()) for n in outcome.arrays}
    )
    with torch.inference_mode():
        outputs = model(inputs_of(config, torch.device("cpu"))(test.inputs))
    return cell, test.targets.numpy(), outputs.double().numpy()


def agree(found: float, wanted: float) -> None:
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_a_regression_is_logged_by_its_metrics_and_judged_by_the_lowest(tmp_path: Path) -> None:
    config = CASES["regression"].overlay(evaluation__client_fraction=0.2)
    cell, targets, outputs = figures(config, tmp_path)
    metric = cell.metric
    assert (metric.name, metric.higher_is_better, metric.highest) == ("rmse", False, math.inf)
    found = cell.evaluations[-1].metrics
    agree(found["rmse"], math.sqrt(sk.mean_squared_error(targets, outputs[:, 0])))
    agree(found["mae"], sk.mean_absolute_error(targets, outputs[:, 0]))
    agree(found["r2"], sk.r2_score(targets, outputs[:, 0]))
    assert cell.evaluations[-1].value < cell.evaluations[0].value
    own = cell.client_evaluation
    values = sorted(client.value for client in own.clients)
    assert len(values) == 5
    assert own.worst_tenth == values[-1]  # of errors the largest
    agree(own.mean, float(np.mean(values)))
    assert math.isnan(cell.target)


def test_labels_are_judged_by_all_of_them_together(tmp_path: Path) -> None:
    cell, targets, outputs = figures(CASES["multilabel"], tmp_path)
    found, last = cell.evaluations[-1].metrics, cell.evaluations[-1]
    agree(found["micro_f1"], sk.f1_score(targets, outputs > 0, average="micro"))
    agree(found["macro_f1"], sk.f1_score(targets, outputs > 0, average="macro"))
    agree(found["subset_accuracy"], sk.accuracy_score(targets, outputs > 0))
    each = sk.f1_score(targets, outputs > 0, average=None)
    assert last.by_class["f1"] == pytest.approx(each, rel=1e-12)
    assert cell.evaluations[0].by_class == {}


def test_pixels_are_judged_by_the_iou_and_counted_in_the_last_line(tmp_path: Path) -> None:
    cell, targets, outputs = figures(CASES["segmentation"], tmp_path)
    known = targets != 255
    pixels = targets[known], outputs.argmax(1)[known]
    last = cell.evaluations[-1]
    assert cell.metric.name == "mean_iou"
    agree(last.value, sk.jaccard_score(*pixels, average="macro"))
    agree(last.metrics["mean_dice"], sk.f1_score(*pixels, average="macro"))
    agree(last.metrics["pixel_accuracy"], sk.accuracy_score(*pixels))
    assert last.by_class["iou"] == pytest.approx(sk.jaccard_score(*pixels, average=None))
    assert np.array_equal(last.confusion, sk.confusion_matrix(*pixels))
    assert cell.evaluations[0].confusion == ()


def test_a_task_of_ones_own_may_have_losses_below_zero(tmp_path: Path) -> None:
    cell, targets, outputs = figures(CASES["a task of one's own"], tmp_path)
    errors = targets - outputs[:, 0]
    agree(cell.evaluations[-1].value, float(np.maximum(0.7 * errors, -0.3 * errors).mean() - 1))
    assert cell.evaluations[-1].metrics["below"] == (errors < 0).mean()
    assert not any(entry.refused for entry in cell.rounds)
    assert all(entry.updates == 4 for entry in cell.rounds)
    start = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert start["task"]["name"] == f"{OWN}:Quantile"
    assert (start["task"]["lowest"], start["task"]["highest"]) == (None, None)


def test_the_metric_does_not_depend_on_the_evaluation_batch() -> None:
    config = CASES["regression"].overlay(rounds=1, cohort=2)
    one, two = (run_experiment(config.overlay(evaluation__batch_size=n)) for n in (1, 256))
    assert one.value == pytest.approx(two.value, rel=1e-6)  # the network's own float32
    assert one.weights_sha256 == two.weights_sha256


WRONG = {
    "no gradient": ("Silent", "Dense", "its loss has no gradient"),
    "one loss for all": ("Scalar", "Dense", "return one loss for each"),
    "a loss that mixes": ("Mixing", "Dense", "changes with those beside it"),
    "nan": ("Undefined", "Dense", "are not finite"),
    "a loss that fails": ("Failing", "Dense", "losses fails on the first examples"),
    "means": ("Means", "Dense", "sums"),
    "sums of float32": ("Coarse", "Dense", "tensors of int64 or float64"),
    "a metric left out": ("Partial", "Dense", "values has no float 'below'"),
    "a metric out of range": ("Overdone", "Dense", "was said to lie between"),
    "another mean loss": ("Other", "Dense", "leave mean_loss out"),
    "two outputs": ("Quantile", "Pair", "return one tensor of floats"),
    "nan outputs": ("Quantile", "Broken", "the network's outputs are not finite"),
    "two dtypes": ("Quantile", "Mixed", "must share one dtype and device, but 'shift'"),
    "no parameter": ("Quantile", "Deaf", "no parameter of the network takes part"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line_before_the_first_round(
    name: str, tmp_path: Path
) -> None:
    task, model, said = WRONG[name]
    config = experiment("numbers", f"{OWN}:{task}", model, checkpoint__folder=str(tmp_path / "r"))
    with pytest.raises(UserError, match=said) as error:
        run_experiment(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r" / "data.json").exists()


SHAPES = {
    "several_numbers": ("regression", "give its last layer 2 outputs"),
    "labels": ("multilabel", "give its last layer 3 outputs"),
    "masks": ("segmentation", "a score for each class and pixel"),
}


@pytest.mark.parametrize("source", SHAPES)
def test_outputs_of_another_shape_are_named(source: str) -> None:
    task, said = SHAPES[source]
    model = "Wide" if source != "masks" else "Flat"
    with pytest.raises(UserError, match=said):
        run_experiment(experiment(source, task, model))


def test_targets_of_another_task_are_named() -> None:
    with pytest.raises(UserError, match=r"set task\.name to what the data are for"):
        run_experiment(experiment("numbers", "classification"))


def test_a_parameter_that_nobody_uses_is_named_and_the_run_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A logger of its own: what other tests leave Flower's like is not looked at here.
    log = logging.Logger("the server's")
    log.addHandler(caplog.handler)
    monkeypatch.setattr("server.global_model._LOG", log)
    run_experiment(experiment("numbers", "regression", "Idle", rounds=1, cohort=2))
    assert "do not depend on 2 of its 6 parameters" in caplog.text
    assert "spare.weight, spare.bias" in caplog.text


def test_a_target_that_the_metric_cannot_have() -> None:
    config = CASES["multilabel"].overlay(evaluation__target=80)
    with pytest.raises(UserError, match="micro_f1 is from 0 to 1"):
        run_experiment(config)
    assert task_of(CASES["multilabel"]).metric.unit == "%"


def test_a_comparison_says_what_is_wrong_before_it_begins() -> None:
    config = experiment("numbers", f"{OWN}:Silent")
    grid = GridConfig.resolve(
        config.flat(), {"compare.normalizers": ["none"], "compare.batch_sizes": [3]}
    )
    with pytest.raises(UserError, match="its loss has no gradient"):
        check(grid)


def test_powers_of_a_loss_that_may_be_negative_are_refused() -> None:
    with pytest.raises(UserError, match="give the task least_loss = 0"):
        run_experiment(CASES["a task of one's own"].overlay(strategy__name="qfedavg"))


def test_programs_are_of_classifiers(tmp_path: Path) -> None:
    run_experiment(CASES["regression"].overlay(checkpoint__folder=str(tmp_path), rounds=1))
    with pytest.raises(UserError, match="programs are for classification"):
        load_trained_model(tmp_path, None)
