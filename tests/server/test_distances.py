"""Updates that move too far for their round, and honest ones that move as far as they can."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedkn.config import ExperimentConfig
from fedkn.training.optimizer import FlatSGD
from server.distances import FACTOR, FLOOR, too_far
from server.screening import Update
from tests.server.fake_grid import run, small
from tests.server.test_run import log_of

SENT = {"w": np.full((4, 4), 0.25, np.float32), "norm.running_var": np.ones(4, np.float32)}
PARAMETERS = ["w"]
START = 1.0  # the norm of w


def updates(*moves: float, variance: float = 1.0, steps: int = 3) -> list[Update]:
    """Return one update for each of `moves` of w, as a norm; the last has that `variance`."""
    found = []
    for partition, move in enumerate(moves):
        last = partition == len(moves) - 1
        arrays = {
            "w": (SENT["w"] + move / 4).astype(np.float32),
            "norm.running_var": np.full(4, variance if last else 1.0, np.float32),
        }
        found.append(Update(partition, arrays, {"steps": steps}))
    return found


def refused(found: list[Update], **changes: object) -> dict[int, str]:
    settings = {"train__clip_norm": 0.0} | changes
    return too_far(found, SENT, PARAMETERS, ExperimentConfig().overlay(**settings), 1)


def test_honest_moves_pass_however_small_the_others_are():
    assert refused(updates(0.1, 0.2, 0.3)) == {}
    assert refused(updates(0.0, 0.0, 0.0)) == {}
    assert refused(updates(0.0, 0.0, FLOOR * START * 0.999)) == {}
    assert refused(updates(1.0, 1.1, FACTOR * 1.1 * 0.999)) == {}


@pytest.mark.parametrize("move", [FACTOR * 1.1 * 1.001, 1e6, 1e30])
def test_an_update_far_beyond_its_rounds_median_is_refused(move):
    assert list(refused(updates(1.0, 1.1, move))) == [2]
    assert "moves the weights by" in refused(updates(1.0, 1.1, move))[2]


def test_of_two_updates_the_shorter_is_the_measure():
    assert list(refused(updates(1e30, 0.3))) == [0]
    assert refused(updates(3.0, 1.0)) == {}


def test_half_a_cohort_less_one_that_agree_do_not_move_the_measure():
    assert list(refused(updates(1.0, 1.0, 1.0, 1e9, 1e9))) == [3, 4]
    assert list(refused(updates(1.0, 1.0, 1e9, 1e9))) == [2, 3]


def test_statistics_have_a_measure_of_their_own():
    assert list(refused(updates(1.0, 1.0, 1.0, variance=1e30))) == [2]
    assert "moves the statistics by" in refused(updates(1.0, 1.0, 1.0, variance=1e30))[2]
    assert refused(updates(1.0, 1.0, 1.0, variance=1.2)) == {}


@pytest.mark.parametrize("limit", [0.0, 5.0])
def test_a_number_in_its_place_switches_it_off(limit):
    assert refused(updates(1.0, 1.0, 1e9), server__max_update_norm=limit) == {}


@pytest.mark.parametrize("mechanism", ["server_fixed", "client_adaptive"])
def test_where_updates_are_clipped_none_is_refused_by_the_others(mechanism):
    assert refused(updates(1.0, 1.0, 1e9), privacy__mechanism=mechanism) == {}


@pytest.mark.parametrize("strategy", ["fednova", "scaffold"])
def test_who_understates_its_steps_to_pull_harder_is_refused(strategy):
    found = updates(1.0, 1.0, 1.0, 9.0)
    found[3].metrics["steps"] = 1
    found[2].metrics["steps"] = 30
    assert refused(found) == {}
    assert list(refused(found, strategy__name=strategy)) == [3]
    assert "for the steps that it claims" in refused(found, strategy__name=strategy)[3]


@pytest.mark.parametrize(("loss", "bad"), [(90.0, False), (1e3, True), (3e38, True)])
def test_who_reports_a_loss_beyond_all_others_does_not_outweigh_them(loss, bad):
    found = updates(1.0, 1.0, 1.0)
    for update, value in zip(found, (0.5, 0.6, loss), strict=True):
        update.metrics["train-loss"] = value
    assert refused(found) == {}
    assert list(refused(found, strategy__name="qfedavg")) == ([2] if bad else [])


# -- what clipped steps can do ---------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_no_client_moves_farther_than_its_clipped_steps_and_one_can_come_near(momentum, decay):
    """FlatSGD under gradients that are always as large as they may be, and point one way."""
    rate, clip, steps = 0.1, 2.0, 60
    model = torch.nn.Linear(4, 4, bias=False)
    optimizer = FlatSGD(model)
    direction = torch.full((16,), 0.25)
    with torch.no_grad():
        optimizer.values.copy_(direction)  # away from the origin: decay pulls against it
    for _ in range(steps):
        optimizer.gradients.copy_(1e6 * direction)
        optimizer.step(rate, momentum=momentum, weight_decay=decay, clip_norm=clip)
    moved = float(torch.linalg.vector_norm(optimizer.values - direction))
    settings = {
        "train__clip_norm": clip,
        "train__learning_rate": rate,
        "train__momentum": momentum,
        "train__weight_decay": decay,
    }
    assert refused(updates(moved, steps=steps), **settings) == {}
    # Decay bounds from above what here it takes away.
    most = moved * (1.3 if not decay else 30)
    assert "its steps can by" in refused(updates(most, steps=steps), **settings)[0]


def test_one_that_is_alone_cannot_send_what_its_steps_do_not_reach():
    assert list(refused(updates(1e30), train__clip_norm=10.0)) == [0]
    assert refused(updates(1.0), train__clip_norm=10.0) == {}


# -- in whole runs ---------------------------------------------------------------------------------


def spoiled(value: float, only: bool = False):
    def tamper(round_: int, partition: int, message: Message, honest: Message) -> list[Message]:
        if partition:
            return [honest]
        arrays = ArrayRecord()
        for name, array in honest.content.array_records["arrays"].items():
            changed = array.numpy().copy()
            if only:
                changed.flat[0] = value
            else:
                changed[...] = value
            arrays[name] = Array(changed)
        metrics = honest.content.metric_records["metrics"]
        return [Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)]

    return tamper


@pytest.mark.parametrize("cohort", [1, 2, 6])
@pytest.mark.parametrize("only", [False, True])
def test_one_device_of_any_cohort_cannot_make_its_weights_the_model(cohort, only, tmp_path):
    config = small(
        cohort=cohort,
        partition__clients=cohort,
        rounds=1,
        checkpoint__folder=str(tmp_path),
        server__max_failed_rounds=5,
    )
    if cohort > 1:
        outcome = run(config, spoiled(1e30, only))
        assert max(np.abs(v).max() for v in outcome.tensors.values()) < 10
    else:
        with pytest.raises(Exception, match="its steps can by"):
            run(config, spoiled(1e30, only))
    (line,) = log_of(tmp_path, "round")
    assert [entry["client"] for entry in line["refused"]] == [0]


@pytest.mark.parametrize(
    "changes",
    [
        {"partition__scheme": "dirichlet", "partition__alpha": 0.1},
        {"partition__scheme": "quantity", "partition__sigma": 2.0, "train__local_steps": 0},
        {"train__learning_rate": 5.0},
        {"train__momentum": 0.9, "train__learning_rate": 0.5},
        {"normalizer__name": "batch", "train__batch_size": 4, "train__learning_rate": 2.0},
        {"normalizer__name": "brn", "train__batch_size": 4, "partition__scheme": "quantity"},
        {"strategy__name": "fednova", "partition__scheme": "quantity"},
        {"strategy__name": "scaffold", "partition__alpha": 0.1, "partition__scheme": "dirichlet"},
    ],
)
def test_honest_runs_meet_no_bound(changes, tmp_path):
    config = small(cohort=6, rounds=3, checkpoint__folder=str(tmp_path), **changes)
    bounded = run(config)
    assert all(not line["refused"] for line in log_of(tmp_path, "round"))
    free = run(
        config.overlay(server__max_update_norm=0, server__max_examples=0, checkpoint__folder="")
    )
    assert bounded.weights_sha256 == free.weights_sha256
