"""What the server does with replies of one hostile device among honest ones.

Every case is a round (or a joining, or an evaluation) through the server's own functions; honest
updates are made up, near what was sent, so that a case takes milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from fedkn.config import ExperimentConfig
from fedkn.experiment import data_summary, task_of
from fedkn.federation import (
    ARRAYS,
    METRICS,
    TRAIN_METRICS,
    arrays_record,
    arrays_to_tensors,
    evaluation_metrics,
    join_answer,
    packed,
)
from fedkn.normalizers import FederationRule, TensorRole
from server.gate.exchange import _largest_reply
from server.global_model import GlobalModel
from server.metrics_log import MetricsLog
from server.rounds.aggregation import Aggregator
from server.rounds.client_evaluation import evaluate_clients
from server.rounds.identities import Identities
from server.rounds.loop import Federation, run_round
from server.rounds.membership import Member, Membership
from server.rounds.participation import begin
from server.rounds.waiting import Waiting
from server.run import run_server
from tests.fuzz.hostile import arrived, changed, parts_of
from tests.fuzz.mutation import NUMBERS, TEXTS, mutated, mutated_bytes
from tests.server.fake_grid import FIRST_NODE, FakeGrid, ScriptedGrid, small

__all__ = ["evaluating", "joining", "training", "whole_runs"]

_CLIENTS, _EXAMPLES = 4, 40
_STRATEGIES = (
    *("fedavg", "fedadam", "fedavgm", "qfedavg", "fedmedian", "fedtrimmedavg", "krum", "scaffold"),
    *("fednova", "fedprox"),
)


class Stub(Membership):
    """Every client is online, as node FIRST_NODE + partition."""

    waited, waited_for = 0.0, []

    def __init__(self) -> None:
        pass

    def online(
        self, partitions: Iterable[int], waiting: Waiting | None = None
    ) -> dict[int, Member]:
        return {p: Member(FIRST_NODE + p, p, _EXAMPLES) for p in partitions}


def training(rng: random.Random) -> str:
    """A round in which one of four updates is hostile; return what became of it."""
    config, model = _experiment(rng.choice(_STRATEGIES))
    aggregator = Aggregator(config, model.rule, model.parameters)
    deployed = rng.random() < 0.6

    def respond(message: Message) -> list[Message]:
        partition = message.metadata.dst_node_id - FIRST_NODE
        honest = _update(message, partition)
        return [honest] if partition else _hostile(rng, honest, message, deployed)

    federation = Federation(
        config=config,
        grid=ScriptedGrid([], respond),
        model=model,
        membership=Stub(),
        aggregator=aggregator,
        waiting=Waiting(MetricsLog("", ""), lambda client: None),
    )
    following, report = run_round(1, dict(model.sent), begin(_CLIENTS), federation)
    fields = report.fields()
    json.dumps(fields, allow_nan=False)
    assert report.updates, "the honest updates were lost"
    assert {u.partition for u in report.updates} >= {1, 2, 3}, report.refused
    for name, value in following.items():
        assert np.isfinite(value).all(), name
        assert np.abs(value.astype(np.float64)).max(initial=0) < 1e6, name
    reasons = [entry["reason"] for entry in (*report.refused, *report.failed)]
    _check_texts(reasons)
    return _kind(reasons)


def joining(rng: random.Random) -> str:
    """A joining in which one of four answers is hostile, half of them with keys as in a fleet."""
    config, _ = _experiment("fedavg")
    deployed, keyed = rng.random() < 0.6, rng.random() < 0.5

    def respond(message: Message) -> list[Message]:
        partition = message.metadata.dst_node_id - FIRST_NODE
        honest = Message(join_answer(partition, _EXAMPLES), reply_to=message)
        return [honest] if partition else _hostile(rng, honest, message, deployed)

    grid = Keyed([FIRST_NODE + p for p in range(_CLIENTS)], respond)
    identities = _IDENTITIES if keyed else None
    membership = Membership(grid, _CLIENTS, 0.0, data=data_summary(config), identities=identities)
    complaints = membership._ask(set(grid.nodes), 1.0)
    members = membership.online(range(1, _CLIENTS))
    assert list(members) == [1, 2, 3], members
    taken = {p: m.node_id for p, m in members.items() if m.node_id != FIRST_NODE + p}
    # Without keys the first that claims a partition is believed.
    assert not taken if keyed else list(taken.values()) in ([], [FIRST_NODE]), taken
    _check_texts([*complaints, membership.why_absent(0).removeprefix("refused on joining: ")])
    return _kind(complaints)


def evaluating(rng: random.Random) -> str:
    """An evaluation of the clients' own models in which one of four answers is hostile."""
    config, model = _experiment("fedavg")
    deployed = rng.random() < 0.6

    def respond(message: Message) -> list[Message]:
        partition = message.metadata.dst_node_id - FIRST_NODE
        answer = RecordDict({METRICS: evaluation_metrics(partition, 8, 0.625, 0.75)})
        honest = Message(answer, reply_to=message)
        return [honest] if partition else _hostile(rng, honest, message, deployed)

    result = evaluate_clients(
        model.sent,
        begin(_CLIENTS),
        config=config,
        grid=ScriptedGrid([], respond),
        membership=Stub(),
    )
    fields = result.fields()
    json.dumps(fields, allow_nan=False)
    assert [entry["client"] for entry in result.clients][-3:] == [1, 2, 3]
    assert 0 <= fields["mean"] <= 1
    reasons = [entry["reason"] for entry in result.failed]
    _check_texts(reasons)
    return _kind(reasons)


def whole_runs(rng: random.Random) -> str:
    """A run of real clients, one of which is hostile in every round."""
    config = small(rounds=2, cohort=4, partition__clients=4, data__test_limit=20)

    def tamper(round_: int, partition: int, message: Message, honest: Message) -> list[Message]:
        if partition or honest.has_error():
            return [honest]
        return _hostile(rng, honest, message, rng.random() < 0.6)

    outcome = run_server(FakeGrid(config, tamper), config)
    assert math.isfinite(outcome.evaluation.loss)
    return "run"


class Keyed(ScriptedGrid):
    """Nodes that Flower knows by their keys: that of node N is ``key N``."""

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=b"key %d" % node) for node in self.nodes]


_IDENTITIES = Identities(
    {hashlib.sha256(b"key %d" % (FIRST_NODE + p)).hexdigest(): p for p in range(_CLIENTS)}
)


class Model(GlobalModel):
    """Six small tensors, as of a convolution, BatchNorm and a classifier."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        shapes = {
            "conv.weight": (4, 1, 3, 3),
            "norm.weight": (4,),
            "norm.running_mean": (4,),
            "norm.running_var": (4,),
            "fc.weight": (3, 4),
            "fc.scale": (),
        }
        self.sent = {
            name: np.asarray(1 + generator.random(shape), np.float32)
            for name, shape in shapes.items()
        }
        self.parameters = [name for name in shapes if "running" not in name]
        self.fixed_sha256 = ""
        self.task = task_of(small())
        self.spreads, self.counts = frozenset(["norm.running_var"]), frozenset()

    def rule(self, round_: int) -> FederationRule:
        del round_
        return FederationRule(dict.fromkeys(self.sent, TensorRole.SHARED))


@lru_cache(maxsize=32)
def _experiment(strategy: str) -> tuple[ExperimentConfig, Model]:
    config = small(
        cohort=_CLIENTS,
        partition__clients=_CLIENTS,
        strategy__name=strategy,
        train__batch_size=4,
        evaluation__client_fraction=0.2,
    )
    return config, Model()


def _update(message: Message, partition: int) -> Message:
    record = message.content.array_records[ARRAYS]
    moved = {
        name: (value.numpy() + np.float32(0.001 * (partition + 1))).astype(value.numpy().dtype)
        for name, value in arrays_to_tensors(record).items()
    }
    values = (partition, _EXAMPLES, 12, 3, 0, 0, 1.25, 0.5, 0, 0.0, 0, 0)
    metrics = MetricRecord(dict(zip(TRAIN_METRICS, values, strict=True)))
    return Message(RecordDict({ARRAYS: arrays_record(moved), METRICS: metrics}), reply_to=message)


def _hostile(
    rng: random.Random, honest: Message, message: Message, deployed: bool
) -> list[Message]:
    """Return what arrives of a reply that is changed: through the wire's parts, or in memory."""
    if not deployed:
        return _changed_in_memory(rng, honest, message)
    records = honest.content.array_records
    if ARRAYS in records and rng.random() < 0.7:
        whole = packed(records[ARRAYS])
        (name,) = whole
        if rng.random() < 0.5:
            data = mutated_bytes(rng, whole[name].data)
            whole[name] = Array("uint8", (len(data),), name, data)
        honest.content[ARRAYS] = whole
    whole_messages, lost = arrived(
        rng, honest, changed(rng, parts_of(honest)), _largest_reply([message])
    )
    _check_texts(lost.values())
    assert not any("MemoryError" in reason for reason in lost.values()), lost
    if lost:
        # What `exchange` hands on of a reply that never will be, in the form of a grid that has
        # no other: an error.
        return [Message(Error(1, next(iter(lost.values()))), reply_to=message)]
    return whole_messages


def _changed_in_memory(rng: random.Random, honest: Message, message: Message) -> list[Message]:
    content: dict[str, Any] = dict(honest.content)
    changes: list[Callable[[], Any]] = [
        lambda: content.update({METRICS: _metrics(rng, content.get(METRICS))}),
        lambda: content.update({METRICS: _metrics(rng, content.get(METRICS))}),
        lambda: content.update({rng.choice(TEXTS): MetricRecord({"x": 1})}),
        lambda: content.update({"config": ConfigRecord({"x": rng.choice(TEXTS)})}),
        lambda: content.pop(rng.choice(list(content)), None) if content else None,
    ]
    if ARRAYS in content:
        changes += [lambda: content.update({ARRAYS: _arrays(rng, content.get(ARRAYS))})] * 5
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice(changes)()
    reply = Message(RecordDict(content), reply_to=message)
    match rng.randrange(12):
        case 0:
            return [Message(Error(rng.choice((0, 1, -1)), rng.choice(TEXTS)), reply_to=message)]
        case 1:
            return []
        case 2:
            return [reply, deepcopy(honest)]
        case 3:
            reply.metadata.__dict__["_src_node_id"] = rng.choice((1, FIRST_NODE + 1))
        case 4:
            reply.metadata.__dict__["_reply_to_message_id"] = rng.choice(TEXTS)
        case _:
            pass
    return [reply]


def _metrics(rng: random.Random, record: Any) -> MetricRecord:
    values: dict[str, Any] = dict(record) if isinstance(record, MetricRecord) else {}
    key = rng.choice(list(values) or ["x"])
    match rng.randrange(8):
        case 0:
            values.pop(key, None)
        case 1:
            values |= {f"{rng.choice(TEXTS)}{n}": 1 for n in range(rng.choice((1, 1, 1, 1, 500)))}
        case 2:
            values[key] = mutated(rng, values.get(key))
        case _:
            values[key] = rng.choice(NUMBERS)
    try:
        return MetricRecord(values)
    except (TypeError, ValueError):
        return MetricRecord({key: 10**400})


def _arrays(rng: random.Random, record: Any) -> ArrayRecord:
    arrays: dict[str, Array] = dict(record) if isinstance(record, ArrayRecord) else {}
    if not arrays:
        return ArrayRecord()
    name = rng.choice(list(arrays))
    array = arrays[name]
    match rng.randrange(9):
        case 0:
            del arrays[name]
        case 1:
            arrays[rng.choice(TEXTS)] = arrays.pop(name)
        case 2:
            arrays[name] = Array(array.dtype, array.shape, rng.choice(TEXTS), array.data)
        case 3:
            shape = tuple(rng.choice((0, 1, -1, 3, 10**12)) for _ in range(rng.randrange(5)))
            arrays[name] = Array(array.dtype, shape, array.stype, array.data)
        case 4:
            dtype = rng.choice(("float64", "object", "<U8", "", "V100000000", "int64", ">f4"))
            arrays[name] = Array(dtype, array.shape, array.stype, array.data)
        case 5 | 6:
            data = mutated_bytes(rng, array.data)
            arrays[name] = Array(array.dtype, array.shape, array.stype, data)
        case _ if array.stype == "numpy.ndarray":
            try:
                value = array.numpy().copy()
            # An earlier change has made it no array.
            except Exception:
                return ArrayRecord(arrays)
            number = rng.choice([n for n in NUMBERS if isinstance(n, float)])
            with np.errstate(over="ignore"):
                if value.size and rng.random() < 0.5:
                    value.flat[rng.randrange(value.size)] = number
                else:
                    value[...] = number
            arrays[name] = Array(value)
        case _:
            pass
    return ArrayRecord(arrays)


def _check_texts(texts: Iterable[str]) -> None:
    for text in texts:
        assert len(text) <= 400, len(text)
        assert text.isprintable(), ascii(text[:200])


def _kind(reasons: Iterable[str]) -> str:
    """Return what a refusal is about, for the campaign's table: "accepted" where there is none."""
    first = next(iter(reasons), None)
    if first is None:
        return "harmless: accepted"
    for word, kind in _WORDS.items():
        if word in first:
            return kind
    return "error reply, or another reason"


_WORDS = {
    "unreadable reply": "parts",
    "metric": "metrics",
    "examples": "examples",
    "partition": "partition",
    "record": "records",
    "tensors": "tensors",
    "bytes": "sizes",
    "moves": "too far",
    "finite": "not finite",
    "shape": "shape or dtype",
    "dtype": "shape or dtype",
    "array": "no array",
    "unreadable": "unreadable",
    "index": "sizes",
    "negative": "statistics",
    "node": "another node",
    "no reply": "no reply",
    "answers no message": "another message",
    "serialized": "no array",
    "weight": "too far",
    "reply": "no reply",
}
