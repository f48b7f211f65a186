"""Early stopping and the best round: by validation images, whatever the test images say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.tasks.metric import ACCURACY, Metric
from server.checkpoints import weights_sha256
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


def validated(config: ExperimentConfig, folder: Path) -> dict[int, float]:
    """Return accuracy on validation images by round, from the checkpoints of a plain run."""
    from server.checkpoints import _read

    plain = config.overlay(
        checkpoint__folder=str(folder),
        checkpoint__keep=100,
        checkpoint__best=False,
        evaluation__patience=0,
    )
    run(plain)
    judge = GlobalModel(plain.overlay(evaluation__split="validation"))
    files = sorted((folder / "cells" / "experiment").glob("checkpoint-*"))
    assert len(files) == config.rounds
    return {c.round_: judge.evaluate(c.tensors).accuracy for c, _ in map(_read, files)}


# Steps so large that the accuracy goes up and down.
RESTLESS: dict[str, Any] = {
    "rounds": 6,
    "train__learning_rate": 0.3,
    "train__local_steps": 6,
    "model__final_norm": "kernel",
}


@pytest.fixture(scope="module")
def restless(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], Path]:
    folder = tmp_path_factory.mktemp("restless")
    return validated(small(**RESTLESS), folder), folder


def test_the_result_is_the_best_round_on_validation_images(restless, tmp_path):
    by_round, plain = restless
    best = max(by_round, key=lambda round_: (by_round[round_], -round_))
    assert best != 6, "the last round is the best: this shows nothing"
    config = small(**RESTLESS, checkpoint__best=True, checkpoint__folder=str(tmp_path))
    outcome = run(config)
    (end,) = log_of(tmp_path, "end")
    assert (end["best_round"], end["rounds"]) == (best, 6)
    assert end["best_value"] == pytest.approx(by_round[best])
    from server.checkpoints import _read

    kept, _ = _read(plain / "cells" / "experiment" / f"checkpoint-{best:06d}.safetensors")
    assert outcome.weights_sha256 == end["weights_sha256"] == weights_sha256(kept.tensors)
    lines = {(e["split"], e["round"]): e for e in log_of(tmp_path, "evaluation")}
    for round_, value in by_round.items():
        assert lines["validation", round_]["accuracy"] == value
    # The result is told of on test images, as without a choice.
    without = {e["round"]: e for e in log_of(plain, "evaluation")}
    assert {k[1]: e for k, e in lines.items() if k[0] == "test"} == without
    assert outcome.evaluation.accuracy == without[best]["accuracy"]


def test_a_run_stops_when_none_was_better_for_long(restless, tmp_path):
    by_round, plain = restless
    waited, best, stop = 0, -1.0, 0
    for round_, value in by_round.items():
        waited, best = (0, value) if value > best else (waited + 1, best)
        if waited == 1:
            stop = round_
            break
    assert 0 < stop < 6, "it is never worse than before: this shows nothing"
    config = small(**RESTLESS, evaluation__patience=1, checkpoint__folder=str(tmp_path))
    outcome = run(config)
    assert outcome.rounds == stop
    assert [line["round"] for line in log_of(tmp_path, "round")] == [*range(1, stop + 1)]
    from server.checkpoints import _read

    kept, _ = _read(plain / "cells" / "experiment" / f"checkpoint-{stop:06d}.safetensors")
    assert outcome.weights_sha256 == weights_sha256(kept.tensors)
    # Resumed, it is over: nothing is trained, and the outcome is the same.
    again = run(config)
    assert (again.rounds, again.weights_sha256) == (stop, outcome.weights_sha256)
    assert again.evaluation == outcome.evaluation
    assert len(log_of(tmp_path, "round")) == stop


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_that_was_stopped_chooses_as_one_that_was_not(every, tmp_path, monkeypatch):
    settings = RESTLESS | {"checkpoint__best": True, "checkpoint__every": every}
    settings |= {"evaluation__patience": 3}
    whole = run(small(**settings, checkpoint__folder=str(tmp_path / "whole")))

    class Stop(Exception):
        pass

    folder = tmp_path / "stopped"
    config = small(**settings, checkpoint__folder=str(folder))
    for round_ in (3, 4):

        def tamper(at, partition, sent, reply, limit=round_):
            if at == limit:
                raise Stop
            return [reply]

        with pytest.raises(Stop):
            run(config, tamper)
    resumed = run(config)
    assert resumed.weights_sha256 == whole.weights_sha256
    ends = [log_of(of, "end")[-1] for of in (folder, tmp_path / "whole")]
    assert ends[0]["best_round"] == ends[1]["best_round"]
    assert ends[0]["rounds"] == ends[1]["rounds"]


def test_choosing_changes_nothing_of_the_training(restless):
    _, plain = restless
    (end,) = log_of(plain, "end")
    assert run(small(**RESTLESS, evaluation__patience=99)).weights_sha256 == end["weights_sha256"]


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
