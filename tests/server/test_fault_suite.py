"""Every fault of a client, in a whole run: it costs the round that update, and nothing more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message

from fedkn.experiment import federated_data
from server.rounds.loop import NoValidUpdates
from server.rounds.membership import Membership
from server.run import run_server
from tests.server.fake_grid import FIRST_NODE, FakeGrid, Tamper, run, small
from tests.server.faults import FAULTS, spoiled

BOUND = 50.0


def first_of_cohort(config, round_=1) -> int:
    """Return the partition that a run's first message of `round_` goes to."""
    asked: list[tuple[int, int]] = []

    def note(round_: int, partition: int, message: Message, reply: Message) -> Iterable[Message]:
        asked.append((round_, partition))
        return [reply]

    run(config, note)
    return next(partition for number, partition in asked if number == round_)


@pytest.fixture(scope="module")
def config():
    return small(server__max_update_norm=BOUND)


@pytest.fixture(scope="module")
def culprit(config) -> int:
    return first_of_cohort(config)


@pytest.fixture(scope="module")
def without_culprit(config, culprit) -> str:
    """The hash of the run in which the culprit never answers."""
    return run(config, only_for(culprit, lambda message, reply: [])).weights_sha256


def only_for(culprit: int, change) -> Tamper:
    def tamper(round_: int, partition: int, message: Message, reply: Message) -> Iterable[Message]:
        return change(message, reply) if partition == culprit else [reply]

    return tamper


def rounds_of(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "round"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoiled_update_is_refused_and_the_rest_counts(
    fault, config, culprit, without_culprit, tmp_path
):
    logged = config.overlay(checkpoint__folder=str(tmp_path))
    bad = only_for(culprit, lambda message, reply: [spoiled(fault, reply, message)])
    assert run(logged, bad).weights_sha256 == without_culprit
    first = rounds_of(tmp_path)[0]
    assert first["updates"] == config.cohort - 1
    assert [entry["client"] for entry in first["refused"]] == [culprit]
    assert re.search(FAULTS[fault][1], first["refused"][0]["reason"])
    assert first["failed"] == []


def test_the_culprit_matters(config, without_culprit):
    assert run(config).weights_sha256 != without_culprit


def test_without_a_bound_a_distant_update_passes(culprit):
    """The norm bound is what refuses it: it is finite and well-formed."""
    unbounded = small(server__max_update_norm=0)
    honest = run(unbounded)
    fault = "a million times too far"
    distant = run(
        unbounded, only_for(culprit, lambda message, reply: [spoiled(fault, reply, message)])
    )
    name = next(iter(honest.tensors))
    assert np.abs(distant.tensors[name]).max() > 1e4 * np.abs(honest.tensors[name]).max()


def test_an_exception_on_a_client_is_a_failure(config, culprit, without_culprit, tmp_path):
    logged = config.overlay(checkpoint__folder=str(tmp_path))
    error = Error(1, "Traceback (most recent call last):\n  …\nRuntimeError: out of memory")
    raised = only_for(culprit, lambda message, reply: [Message(error, reply_to=message)])
    assert run(logged, raised).weights_sha256 == without_culprit
    assert rounds_of(tmp_path)[0]["failed"] == [
        {"client": culprit, "reason": "RuntimeError: out of memory"}
    ]


def test_an_exception_in_the_client_app_is_a_failure(config, culprit, without_culprit):
    grid = FakeGrid(config)
    honest = grid._contexts[FIRST_NODE + culprit]
    deliver = grid._deliver

    def break_after_joining(message: Message) -> Iterable[Message]:
        if message.metadata.message_type == "train":
            honest.node_config = {"partition-id": "none"}
        return deliver(message)

    grid.respond = break_after_joining
    assert run_server(grid, config).weights_sha256 == without_culprit


def test_a_hung_client_is_a_failure(config, culprit, without_culprit, tmp_path):
    logged = config.overlay(checkpoint__folder=str(tmp_path))
    assert run(logged, only_for(culprit, lambda m, r: [])).weights_sha256 == without_culprit
    (failed,) = rounds_of(tmp_path)[0]["failed"]
    assert failed["client"] == culprit
    assert "server.round_timeout" in failed["reason"]


def test_a_client_that_goes_offline_is_a_failure(
    config, culprit, without_culprit, tmp_path, monkeypatch
):
    logged = config.overlay(checkpoint__folder=str(tmp_path), server__join_timeout=0.2)
    grid = FakeGrid(logged)
    join = Membership.join

    def leave_after_joining(membership: Membership) -> None:
        join(membership)
        grid.nodes.remove(FIRST_NODE + culprit)

    monkeypatch.setattr(Membership, "join", leave_after_joining)
    assert run_server(grid, logged).weights_sha256 == without_culprit
    assert rounds_of(tmp_path)[0]["failed"] == [
        {"client": culprit, "reason": "not online when the round began"}
    ]


@pytest.mark.parametrize("order", ["twice", "spoiled second", "error second"])
def test_a_second_reply_does_not_count(order, config, culprit, tmp_path):
    logged = config.overlay(checkpoint__folder=str(tmp_path))

    def again(message: Message, reply: Message) -> list[Message]:
        second = {
            "twice": lambda: reply,
            "spoiled second": lambda: spoiled("nan", reply, message),
            "error second": lambda: Message(Error(1, "late crash"), reply_to=message),
        }[order]()
        return [reply, second]

    assert run(logged, only_for(culprit, again)).weights_sha256 == run(config).weights_sha256
    first = rounds_of(tmp_path)[0]
    assert first["updates"] == config.cohort
    assert first["refused"] == [{"client": culprit, "reason": "a second reply in the same round"}]
    assert first["failed"] == []


def test_a_good_reply_after_a_bad_one_does_not_count(config, culprit, without_culprit):
    bad_first = only_for(culprit, lambda m, reply: [spoiled("nan", reply, m), reply])
    assert run(config, bad_first).weights_sha256 == without_culprit


def test_a_late_reply_does_not_count(culprit, tmp_path):
    config = small(rounds=3, cohort=6, checkpoint__folder=str(tmp_path))
    kept: list[Message] = []

    def late(round_: int, partition: int, message: Message, reply: Message) -> Iterable[Message]:
        if partition != culprit:
            return [reply]
        if round_ == 1:
            kept.append(reply)
            return []
        return [*kept, reply]  # last round's comes in first, this round's after it

    def silent(round_: int, partition: int, message: Message, reply: Message) -> Iterable[Message]:
        return [] if (round_, partition) == (1, culprit) else [reply]

    expected = run(config.overlay(checkpoint__folder=""), silent).weights_sha256
    assert run(config, late).weights_sha256 == expected
    second = rounds_of(tmp_path)[1]
    assert second["updates"] == 6
    assert second["refused"] == [{"client": None, "reason": "answers no message of this round"}]


def test_a_reply_for_somebody_else_does_not_count(config, culprit, without_culprit, tmp_path):
    """A node cannot speak for another partition of the cohort, nor from another node."""
    logged = config.overlay(checkpoint__folder=str(tmp_path))
    others: list[int] = []

    def impostor(round_: int, partition: int, message: Message, reply: Message):
        if partition != culprit:
            others.append(partition)
            return [reply]
        metrics = reply.content.metric_records["metrics"]
        # Of the same round's cohort and of the right size: the gate has nothing against it.
        metrics["partition-id"] = cohort[round_][-1]
        metrics["num-examples"] = len(federated_data(config).parts[cohort[round_][-1]])
        return [reply]

    cohort: dict[int, list[int]] = {}

    def note(round_: int, partition: int, message: Message, reply: Message):
        cohort.setdefault(round_, []).append(partition)
        return [reply]

    run(config, note)
    assert cohort[1][-1] != culprit
    assert run(logged, impostor).weights_sha256 == without_culprit
    assert rounds_of(tmp_path)[0]["refused"] == [
        {"client": culprit, "reason": f"claims to be partition {cohort[1][-1]}"}
    ]


def test_a_reply_from_an_unknown_node_does_not_count(config, culprit, without_culprit, tmp_path):
    logged = config.overlay(checkpoint__folder=str(tmp_path))

    def stranger(message: Message, reply: Message) -> list[Message]:
        reply.metadata.__dict__["_src_node_id"] = 9999
        return [reply]

    assert run(logged, only_for(culprit, stranger)).weights_sha256 == without_culprit
    assert rounds_of(tmp_path)[0]["refused"] == [
        {"client": culprit, "reason": "from a node that was not asked"}
    ]


def test_the_order_of_replies_does_not_matter(config):
    honest = run(config)
    grid = FakeGrid(config)
    send = grid.send_and_receive
    grid.send_and_receive = lambda messages, *, timeout=None: list(  # type: ignore[method-assign]
        reversed(list(send(messages, timeout=timeout)))
    )
    assert run_server(grid, config).weights_sha256 == honest.weights_sha256


def test_when_all_are_refused_the_run_ends_and_the_model_is_kept(tmp_path):
    config = small(rounds=9, server__max_failed_rounds=3, checkpoint__folder=str(tmp_path))

    def bad_from_round_two(round_: int, partition: int, message: Message, reply: Message):
        return [reply] if round_ == 1 else [spoiled("nan", reply, message)]

    with pytest.raises(NoValidUpdates, match=r"no valid update in the last 3 round\(s\).*finite"):
        run(config, bad_from_round_two)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["updates"] for line in lines if line["kind"] == "round"] == [3, 0, 0, 0]
    assert lines[-1]["kind"] == "end"
    assert lines[-1]["status"] == "failed"
    accuracies = [line["metrics"]["accuracy"] for line in lines if line["kind"] == "evaluation"]
    assert len(set(accuracies[1:])) == 1  # the model of round 1, three times over
    # Once the clients are mended, a resume ends where the run without the fault does.
    assert run(config).weights_sha256 == run(small(rounds=9)).weights_sha256


def test_a_short_run_without_any_update_does_not_succeed():
    config = small(rounds=1, server__max_failed_rounds=3)
    with pytest.raises(NoValidUpdates):
        run(config, lambda round_, partition, message, reply: [])


def test_a_bad_round_in_between_keeps_the_model(tmp_path):
    config = small(rounds=3, checkpoint__folder=str(tmp_path))

    def bad_round_two(round_: int, partition: int, message: Message, reply: Message):
        return [spoiled("nan", reply, message)] if round_ == 2 else [reply]

    run(config, bad_round_two)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["updates"] for line in lines if line["kind"] == "round"] == [3, 0, 3]
    one, two, three = (
        line["loss"] for line in lines if line["kind"] == "evaluation" and line["round"] > 0
    )
    assert one == two != three
