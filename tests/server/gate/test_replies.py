"""Rounds that end with enough updates."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from flwr.app import Message, MessageType

from fedkn.experiment import federated_data
from server.gate import exchange as module
from server.rounds.membership import ClientsMissing
from server.run import run_server
from tests.server.fake_grid import FIRST_NODE, FakeGrid, run, small
from tests.server.test_run import log_of


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)


class PolledGrid(FakeGrid):
    """Clients answer at once; partition p's reply can be had from the (`delay` of p)th pull on."""

    def __init__(self, config, delays, tamper=None):
        super().__init__(config, tamper)
        self.delays = delays
        self.pulls = 0
        self.pulled: list[int] = []
        self._ready: dict[str, tuple[int, list[Message]]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.pulls = 0
        ids = []
        for message in messages:
            assert message.metadata.message_type == MessageType.TRAIN
            replies = list(self.send_and_receive([message]))
            partition = message.metadata.dst_node_id - FIRST_NODE
            ids.append(message.metadata.message_id)
            self._ready[ids[-1]] = (self.delays.get(partition, 0), replies)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        found = []
        for key in message_ids:
            if key in self._ready and self._ready[key][0] < self.pulls:
                replies = self._ready.pop(key)[1]
                self.pulled += [r.metadata.src_node_id - FIRST_NODE for r in replies]
                found += replies
        return found


def everybody(**changes):
    return small(cohort=6, rounds=1, **changes)


def only(partitions: set[int]):
    """What arrives when only these answer."""
    return lambda round_, p, message, reply: [reply] if p in partitions else []


def test_a_round_ends_with_enough_updates_and_names_who_was_late(tmp_path):
    config = everybody(server__enough_updates=4, checkpoint__folder=str(tmp_path))
    grid = PolledGrid(config, {1: 3, 4: 99, 5: 99})
    outcome = run_server(grid, config)
    (line,) = log_of(tmp_path, "round")
    assert line["late"] == [4, 5]
    assert line["failed"] == line["refused"] == []
    assert line["updates"] == 4
    expected = run(everybody(), only({0, 1, 2, 3}))
    assert outcome.weights_sha256 == expected.weights_sha256


def test_all_that_came_with_the_last_one_count(tmp_path):
    config = everybody(server__enough_updates=2, checkpoint__folder=str(tmp_path))
    outcome = run_server(PolledGrid(config, {}), config)
    assert outcome.weights_sha256 == run(everybody()).weights_sha256
    (line,) = log_of(tmp_path, "round")
    assert (line["updates"], line["late"]) == (6, [])


def test_refused_and_failed_replies_are_not_among_the_enough(tmp_path):
    def spoil(round_: int, p: int, message: Message, reply: Message) -> Iterable[Message]:
        if p in (0, 1):
            reply.content.metric_records["metrics"]["num-examples"] = 10**12
        return [reply]

    config = everybody(server__enough_updates=3, checkpoint__folder=str(tmp_path))
    run_server(PolledGrid(config, {3: 2, 4: 4, 5: 6}, spoil), config)
    (line,) = log_of(tmp_path, "round")
    assert (line["updates"], line["late"]) == (3, [5])
    assert [entry["client"] for entry in line["refused"]] == [0, 1]


def test_late_replies_of_a_round_are_never_asked_for_again():
    config = small(cohort=6, rounds=2, server__enough_updates=5)
    grid = PolledGrid(config, {5: 99})
    run_server(grid, config)
    assert sorted(grid.pulled) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_too_few_within_the_timeout_are_failures(tmp_path):
    config = everybody(
        server__enough_updates=5, server__round_timeout=0.3, checkpoint__folder=str(tmp_path)
    )
    started = time.monotonic()
    run_server(PolledGrid(config, {4: 10**6, 5: 10**6}), config)
    assert time.monotonic() - started >= 0.3
    (line,) = log_of(tmp_path, "round")
    assert (line["updates"], line["late"]) == (4, [])
    assert [entry["client"] for entry in line["failed"]] == [4, 5]


# -- clients that declare too much ----------------------------------------------------------------


def test_a_client_that_declares_too_many_examples_takes_no_part(tmp_path):
    config = small(
        cohort=6,
        rounds=1,
        partition__scheme="quantity",
        checkpoint__folder=str(tmp_path),
        server__join_timeout=30.0,
    )
    sizes = [len(part) for part in federated_data(config).parts]
    largest = sizes.index(max(sizes))
    limited = config.overlay(server__max_examples=max(sizes) - 1)
    outcome = run(limited)
    (line,) = log_of(tmp_path, "round")
    (failed,) = line["failed"]
    assert failed["client"] == largest
    assert f"declared {max(sizes)} examples, more than server.max_examples" in failed["reason"]
    rest = set(range(6)) - {largest}
    plain = config.overlay(checkpoint__folder="")
    assert outcome.weights_sha256 == run(plain, only(rest)).weights_sha256


def test_if_every_client_is_refused_the_run_says_so():
    with pytest.raises(ClientsMissing, match="every client was refused; client 0 declared"):
        run(small(server__max_examples=1, server__join_timeout=30.0))
