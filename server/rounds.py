"""The rounds of a run: draw a cohort, send, wait, screen, aggregate, evaluate, checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError
from fedkn.experiment import data_summary
from fedkn.federation import (
    ARRAYS,
    CONFIG,
    CONTROL,
    DATA,
    LEARNING_RATE,
    ROUND,
    data_record,
    record_bytes,
)
from fedkn.training import learning_rate
from server.aggregation import Aggregator, NoAggregate
from server.cohorts import draw_cohort
from server.distances import too_far
from server.global_model import GlobalModel
from server.membership import Membership
from server.participation import Participation
from server.replies import Replies, collect
from server.screening import Screen, Update
from server.waiting import Waiting
from server.wire import sent_through

__all__ = ["NoValidUpdates", "RoundReport", "run_round"]

_LOG = logging.getLogger("flwr")


class NoValidUpdates(FedknError):
    """Too many rounds in a row came back without a single valid update."""


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round; the fields are those of the log (docs/run-folder.md).

    Attributes:
        cohort: the partitions drawn. updates: the valid ones, ordered by partition.
        refused, failed: ``{"client": partition or None, "reason": one line}``, so ordered too.
        late: partitions whose reply was not waited for (``server.enough_updates``).
        strategy: what the strategy adds: under client-level privacy ``clip_norm`` and
            ``noise_deviation``.
        bytes_down, bytes_up: of arrays, over the cohort; refused ones were received as well.
        learning_rate: the clients'. seconds: how long the round took.
        waiting_seconds: in which nothing was waited for but clients that were not there.
        waited_for: these partitions.
    """

    round_: int
    cohort: list[int]
    updates: list[Update]
    refused: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    late: list[int]
    strategy: dict[str, float]
    bytes_down: int
    bytes_up: int
    learning_rate: float
    seconds: float
    waiting_seconds: float
    waited_for: list[int]

    def fields(self) -> dict[str, Any]:
        """Return the fields of the log's line."""

        def total(key: str) -> float:
            return sum(update.metrics[key] for update in self.updates)

        examples = total("trained-examples")
        losses = [u.metrics["train-loss"] * u.metrics["trained-examples"] for u in self.updates]
        return {
            "round": self.round_,
            "seconds": self.seconds,
            "cohort": self.cohort,
            "updates": len(self.updates),
            "examples": int(examples),
            "steps": int(total("steps")),
            "skipped_batches": int(total("skipped-batches")),
            "skipped_examples": int(total("skipped-examples")),
            "refused": self.refused,
            "failed": self.failed,
            "late": self.late,
            "state_lost": [u.partition for u in self.updates if u.metrics["state-lost"]],
            "data_changed": [u.partition for u in self.updates if u.metrics["data-changed"]],
            "epsilon": {
                str(u.partition): u.metrics["epsilon"] for u in self.updates if u.metrics["epsilon"]
            },
            "batch_sizes": {
                str(u.partition): int(u.metrics["batch-size"])
                for u in self.updates
                if u.metrics["batch-size"]
            },
            "train_loss": sum(losses) / examples if examples else None,
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "train_seconds": total("train-seconds"),
            "learning_rate": self.learning_rate,
            "waiting_seconds": self.waiting_seconds,
            "waited_for": self.waited_for,
            **self.strategy,
        }


def run_round(
    round_: int,
    tensors: dict[str, np.ndarray],
    *,
    config: ExperimentConfig,
    grid: Grid,
    model: GlobalModel,
    membership: Membership,
    aggregator: Aggregator,
    participation: Participation,
    waiting: Waiting,
) -> tuple[dict[str, np.ndarray], RoundReport]:
    """Run one round and return the next global tensors (the same if no update was valid).

    The cohort is drawn from all partitions. A member of it that is not online, does not answer in
    time, fails, or is refused, is reported, and the round goes on with the others.
    """
    started = time.perf_counter()
    cohort = draw_cohort(
        range(config.partition.clients), config.cohort, seed=config.seed, round_=round_
    )
    waiting.begin(round_)
    members = membership.online(cohort, waiting)
    rate = learning_rate(config.train, round_, config.rounds)
    instructions = aggregator.training_config(
        round_, tensors, ConfigRecord({ROUND: round_, LEARNING_RATE: rate})
    )
    record = sent_through(grid, tensors)
    control = sent_through(grid, aggregator.control(tensors))
    content: dict[str, ArrayRecord | ConfigRecord] = {
        ARRAYS: record,
        DATA: data_record(data_summary(config)),
    }
    if control:
        content[CONTROL] = control
    messages = {
        partition: Message(
            RecordDict(
                {
                    **content,
                    CONFIG: ConfigRecord({**instructions, **participation.told(partition)}),
                }
            ),
            dst_node_id=member.node_id,
            message_type=MessageType.TRAIN,
        )
        for partition, member in members.items()
    }
    gate = Screen(
        tensors,
        {partition: member.examples for partition, member in members.items()},
        config.train,
        max_norm=0.0 if config.server.max_update_norm == "auto" else config.server.max_update_norm,
        round_timeout=config.server.round_timeout,
        private=config.privacy.mechanism == "example",
        spreads=model.spreads,
        counts=model.counts,
    )
    waiting.begin(round_)
    replies = collect(grid, messages, gate, config.server, waiting.look)
    waiting.end(replies.slowest)
    replies.refuse(too_far(replies.updates, tensors, model.parameters, config, round_))
    replies.failed.extend(
        {"client": partition, "reason": membership.why_absent(partition)}
        for partition in cohort
        if partition not in members
    )
    following = _aggregated(aggregator, round_, tensors, replies)
    for kind, entries in (("refused", replies.refused), ("failed", replies.failed)):
        entries.sort(key=_client)
        for entry in entries:
            _LOG.warning("round %d: %s %s: %s", round_, kind, entry["client"], entry["reason"])
    for update in replies.updates:
        if update.metrics["data-changed"]:
            _LOG.warning(
                "round %d: client %d: its own data changed since its first round of this run",
                *(round_, update.partition),
            )
    report = RoundReport(
        round_=round_,
        cohort=cohort,
        updates=replies.updates,
        refused=replies.refused,
        failed=replies.failed,
        late=replies.late,
        strategy=aggregator.fields() if replies.updates else {},
        bytes_down=(record_bytes(record) + record_bytes(control)) * len(members),
        bytes_up=replies.bytes,
        learning_rate=rate,
        seconds=time.perf_counter() - started,
        waiting_seconds=membership.waited + replies.waited,
        waited_for=sorted({*membership.waited_for, *replies.waited_for}),
    )
    return following, report


def _aggregated(
    aggregator: Aggregator, round_: int, tensors: dict[str, np.ndarray], replies: Replies
) -> dict[str, np.ndarray]:
    """Return the next global tensors; where none can be made of the updates, refuse them all."""
    if not replies.updates:
        return tensors
    try:
        return aggregator.aggregate(round_, tensors, replies.updates)
    except NoAggregate as problem:
        replies.refuse({update.partition: str(problem) for update in replies.updates})
        return tensors


def _client(entry: Mapping[str, Any]) -> int:
    return -1 if entry["client"] is None else int(entry["client"])
