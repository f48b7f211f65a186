"""Early stopping and the best round: by validation images, whatever the test images say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.tasks.metric import ACCURACY, Metric
from server.checkpoints import Checkpoint, _read, weights_sha256
from server.choice import Choice
from server.global_model import GlobalModel
from tests.server.fake_grid import run, small
from tests.server.test_run import log_of

RMSE = Metric("rmse", higher_is_better=False, lowest=0.0)


def chosen(values: list[float], metric: Metric = ACCURACY) -> Choice:
    choice = Choice()
    for round_, value in enumerate(values, 1):
        tensors = {"w": np.array([float(round_)])}
        choice = choice.after(round_, value, tensors, metric=metric, keep=True)
    return choice


@pytest.mark.parametrize(
    ("values", "metric", "best", "waited"),
    [
        ([0.1, 0.3, 0.2, 0.3], ACCURACY, 2, 2),
        ([0.1, 0.3, 0.2, 0.3], RMSE, 1, 3),
        ([3.0, 2.0, 1.0], RMSE, 3, 0),
        ([math.nan, 0.2, math.nan], ACCURACY, 2, 1),
        ([math.nan, math.nan], RMSE, 0, 2),
    ],
)
def test_the_best_is_the_first_that_none_is_better_than(
    values: list[float], metric: Metric, best: int, waited: int
) -> None:
    choice = chosen(values, metric)
    assert (choice.round_, choice.waited) == (best, waited)
    assert choice.tensors == ({"w": np.array([float(best)])} if best else {})
    again = Choice.from_record(json.loads(json.dumps(choice.to_record())), choice.tensors)
    assert (again.round_, again.waited) == (best, waited)
    assert again.value == choice.value or math.isnan(choice.value)


SIX: dict[str, Any] = {"rounds": 6, "checkpoint__keep": 100}
JUDGED = {1: 0.2, 2: 0.5, 3: 0.3, 4: 0.5, 5: 0.4, 6: 0.1}
"""What the validation images are made to say of each round."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, Checkpoint], Path]:
    """A run in which nothing chooses: its checkpoints by round, and its folder."""
    folder = tmp_path_factory.mktemp("plain")
    run(small(**SIX, checkpoint__folder=str(folder)))
    read = [_read(path)[0] for path in (folder / "cells" / "experiment").glob("checkpoint-*")]
    assert len(read) == 6
    return {checkpoint.round_: checkpoint for checkpoint in read}, folder


@pytest.fixture
def judged(plain, monkeypatch):
    """Let the validation images say what is in `JUDGED`, whatever the accuracy is."""
    rounds = {weights_sha256(of.tensors): round_ for round_, of in plain[0].items()}
    evaluate = GlobalModel.evaluate

    def judge(self: GlobalModel, tensors: Any, split: str = "") -> Any:
        evaluation = evaluate(self, tensors, split)
        if split == "validation":
            return replace(evaluation, value=JUDGED[rounds[weights_sha256(tensors)]])
        return evaluation

    monkeypatch.setattr(GlobalModel, "evaluate", judge)


@pytest.mark.usefixtures("judged")
def test_the_result_is_the_best_round_on_validation_images(plain, tmp_path):
    checkpoints, folder = plain
    config = small(**SIX, checkpoint__best=True, checkpoint__folder=str(tmp_path))
    outcome = run(config)
    (end,) = log_of(tmp_path, "end")
    assert (end["best_round"], end["best_value"], end["rounds"]) == (2, 0.5, 6)
    assert outcome.weights_sha256 == weights_sha256(checkpoints[2].tensors)
    assert end["weights_sha256"] == outcome.weights_sha256
    newest, _ = _read(tmp_path / "cells" / "experiment" / "checkpoint-000006.safetensors")
    assert weights_sha256(newest.result) == outcome.weights_sha256
    assert weights_sha256(newest.tensors) == weights_sha256(checkpoints[6].tensors)
    # The result is told of on test images, as where nothing chooses.
    lines = {(e["split"], e["round"]): e for e in log_of(tmp_path, "evaluation")}
    without = {e["round"]: e for e in log_of(folder, "evaluation")}
    for round_, line in without.items():
        told = lines["test", round_]
        assert (told["metrics"], told["loss"]) == (line["metrics"], line["loss"])
    # What it says of every class is told of the round that is the result.
    assert [e["round"] for e in log_of(tmp_path, "evaluation") if "confusion" in e] == [6, 2]
    assert outcome.evaluation.value == without[2]["metrics"]["accuracy"]
    # A run that is complete says the same again.
    again = run(config)
    assert (again.weights_sha256, again.evaluation) == (outcome.weights_sha256, outcome.evaluation)


def test_the_validation_images_are_looked_at_after_every_evaluated_round(plain, tmp_path):
    checkpoints, _ = plain
    run(small(**SIX, evaluation__patience=99, checkpoint__folder=str(tmp_path)))
    lines = [e for e in log_of(tmp_path, "evaluation") if e["split"] == "validation"]
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6]
    judge = GlobalModel(small(**SIX, evaluation__split="validation"))
    for line in lines:
        expected = judge.evaluate(checkpoints[line["round"]].tensors)
        assert (line["metrics"], line["loss"]) == (expected.metrics, expected.loss)
        assert line["examples"] == expected.examples
    # And nothing of the training changes.
    (end,) = log_of(tmp_path, "end")
    assert end["weights_sha256"] == weights_sha256(checkpoints[6].tensors)


@pytest.mark.usefixtures("judged")
@pytest.mark.parametrize(("patience", "stop"), [(1, 3), (3, 5), (5, 6)])
def test_a_run_stops_when_none_was_better_for_long(patience, stop, plain, tmp_path):
    checkpoints, _ = plain
    config = small(**SIX, evaluation__patience=patience, checkpoint__folder=str(tmp_path))
    outcome = run(config)
    assert outcome.rounds == stop
    assert [line["round"] for line in log_of(tmp_path, "round")] == [*range(1, stop + 1)]
    assert outcome.weights_sha256 == weights_sha256(checkpoints[stop].tensors)
    # Resumed, it is over: nothing is trained, and the outcome is the same.
    again = run(config)
    assert (again.rounds, again.weights_sha256) == (stop, outcome.weights_sha256)
    assert again.evaluation == outcome.evaluation
    assert len(log_of(tmp_path, "round")) == stop


@pytest.mark.usefixtures("judged")
def test_a_run_that_was_stopped_chooses_as_one_that_was_not(plain, tmp_path):
    checkpoints, _ = plain
    config = small(
        **SIX,
        checkpoint__best=True,
        checkpoint__every=2,
        evaluation__patience=3,
        checkpoint__folder=str(tmp_path),
    )

    class Stop(Exception):
        pass

    def tamper(round_, partition, sent, reply):
        if round_ == 4:
            raise Stop
        return [reply]

    with pytest.raises(Stop):
        run(config, tamper)
    resumed = run(config)
    assert [line["round"] for line in log_of(tmp_path, "resume")] == [2]
    assert resumed.rounds == 5
    assert resumed.weights_sha256 == weights_sha256(checkpoints[2].tensors)
    assert log_of(tmp_path, "end")[-1]["best_round"] == 2


@pytest.mark.parametrize("key", [{"evaluation.patience": 2}, {"checkpoint.best": True}])
def test_test_images_never_choose(key):
    with pytest.raises(UserError, match="test images must not choose"):
        ExperimentConfig.resolve(key, {"data.validation_fraction": 0})


@pytest.mark.parametrize("key", [{"evaluation__patience": 2}, {"checkpoint__best": True}])
def test_the_global_model_is_not_judged_where_clients_keep_tensors(key):
    with pytest.raises(UserError, match="keeps tensors on the clients"):
        run(small(normalizer__name="fedbn", evaluation__client_fraction=0.2, **key))


def test_a_checkpoint_of_an_earlier_fedkn_is_gone_on_from(tmp_path):
    """Keys that came later are taken as what was done before them."""
    config = small(checkpoint__folder=str(tmp_path), rounds=2)
    whole = run(config)
    path = tmp_path / "cells" / "experiment" / "config.json"
    then = json.loads(path.read_text())
    for key in ("evaluation.patience", "checkpoint.best", "model.options"):
        del then[key]
    path.write_text(json.dumps(then))
    assert run(config).weights_sha256 == whole.weights_sha256
    with pytest.raises(UserError, match=r"evaluation\.patience = 0, not 1"):
        run(config.overlay(evaluation__patience=1))
