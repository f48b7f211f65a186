"""Answers of clients that evaluated their own models, among them odd ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedkn.federation import evaluation_metrics
from server.rounds.client_evaluation import evaluate_clients
from server.rounds.membership import Member, Membership
from server.rounds.participation import begin
from tests.server.fake_grid import FIRST_NODE, ScriptedGrid, small


class Online(Membership):
    """Three clients that declared 40 examples each."""

    def __init__(self) -> None:
        pass

    def online(self, partitions):
        return {p: Member(FIRST_NODE + p, p, 40) for p in partitions}


def evaluated(answer: Callable[[Message], list[Message]]):
    """Return what comes of an evaluation in which client 0 answers by `answer`."""
    config = small(partition__clients=3, evaluation__client_fraction=0.2)

    def respond(message: Message) -> list[Message]:
        partition = message.metadata.dst_node_id - FIRST_NODE
        honest = RecordDict({"metrics": evaluation_metrics(partition, 8, 0.75, 0.5)})
        return answer(message) if not partition else [Message(honest, reply_to=message)]

    return evaluate_clients(
        {"w": np.zeros(3, np.float32)},
        begin(3),
        config=config,
        grid=ScriptedGrid([], respond),
        membership=Online(),
    )


def says(**changes: object) -> Callable[[Message], list[Message]]:
    metrics = {"partition-id": 0, "num-examples": 8, "value": 0.75, "loss": 0.5}
    metrics |= {key.replace("_", "-"): value for key, value in changes.items()}
    return lambda message: [
        Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
    ]


def test_an_honest_answer_counts():
    result = evaluated(says())
    assert result.failed == []
    assert result.clients[0] == {"client": 0, "examples": 8, "value": 0.75, "loss": 0.5}


ODD = {
    "no error text": (lambda m: [Message(Error(1, " \n\u2028"), reply_to=m)], "no reason given"),
    "an escape": (lambda m: [Message(Error(1, "\x1b[2J"), reply_to=m)], r"^\\x1b\[2J$"),
    "nothing": (lambda m: [Message(RecordDict(), reply_to=m)], "got none"),
    "more records": (
        lambda m: [
            Message(RecordDict({**says()(m)[0].content, "x\n": ConfigRecord({"a": 1})}), reply_to=m)
        ],
        "expected one record",
    ),
    "all right of none": (says(num_examples=0, value=1.0), "'num-examples' is 0: 1 to"),
    "more than it can keep": (says(num_examples=10**6, value=0.1), "'num-examples' is 1e"),
    "a count beyond floats": (says(num_examples=10**400), "beyond all floats|1e\\+400|'num-ex"),
    "a real number of images": (says(num_examples=1.7e308), "not a whole number"),
    "more right than there are": (says(value=9 / 8), "'value' is 1.125: 0 to 1 are"),
    "fewer than none": (says(value=-1), "'value' is -1"),
    "nan": (says(loss=math.nan), "not a finite number"),
    "a loss beyond float32": (says(loss=1e300), "'loss' is 1e"),
    "a negative loss": (says(loss=-0.5), "'loss' is -0.5"),
    "a list": (says(loss=[1.0]), "not a finite number"),
    "another's": (says(partition_id=1), "claims to be partition 1"),
    "a word too many": (says(more=1), "missing or not expected: more"),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_answer_costs_that_client_its_part_and_nobody_else(case):
    answer, reason = ODD[case]
    result = evaluated(answer)
    (failed,) = result.failed
    assert failed["client"] == 0
    assert re.search(reason, failed["reason"]), failed
    assert failed["reason"].isprintable()
    assert [entry["client"] for entry in result.clients] == [1, 2]
    assert result.fields()["mean"] == 0.75


def test_a_second_answer_counts_for_nothing():
    twice = evaluated(lambda m: [*says()(m), *says(value=0.1)(m)])
    assert twice.clients[0]["value"] == 0.75
    spoiled_first = evaluated(lambda m: [*says(loss=math.nan)(m), *says()(m)])
    assert [entry["client"] for entry in spoiled_first.failed] == [0]


def test_an_answer_to_another_message_or_of_another_node_is_none():
    def elsewhere(message: Message) -> list[Message]:
        (reply,) = says()(message)
        reply.metadata.__dict__["_reply_to_message_id"] = "other"
        return [reply]

    def forged(message: Message) -> list[Message]:
        (reply,) = says()(message)
        reply.metadata.__dict__["_src_node_id"] = 1
        return [reply]

    assert evaluated(elsewhere).failed == [{"client": 0, "reason": "no reply"}]
    (failed,) = evaluated(forged).failed
    assert "node that was not asked" in failed["reason"]
