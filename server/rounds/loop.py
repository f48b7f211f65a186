"""The rounds of a run: draw a cohort, send, wait, screen, aggregate, evaluate, checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError, UserError
from fedkn.experiment import data_summary
from fedkn.federation import FIXED, LEARNING_RATE, ROUND
from fedkn.training import learning_rate
from server.gate.distances import too_far
from server.gate.replies import Replies, collect, collect_directly
from server.gate.screening import Screen, Update
from server.global_model import GlobalModel
from server.rounds.aggregation import Aggregator, NoAggregate
from server.rounds.cohorts import draw_cohort
from server.rounds.membership import Member, Membership
from server.rounds.participation import Participation
from server.rounds.waiting import Waiting
from server.wire import DirectGrid, Order

__all__ = ["Federation", "NoValidUpdates", "RoundReport", "run_round"]

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
        """Return the fields of the log's line.

        Raises:
            UserError: somebody's own strategy adds one under a name that the line has already.
        """

        def total(key: str) -> float:
            return sum(update.metrics[key] for update in self.updates)

        examples = total("trained-examples")
        losses = [u.metrics["train-loss"] * u.metrics["trained-examples"] for u in self.updates]
        fields = {
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
        }
        if taken := sorted({"kind", *fields} & self.strategy.keys()):
            raise UserError(
                f"the strategy adds '{taken[0]}' to the log, whose own field that is: give it "
                "another name in fields"
            )
        return fields | dict(self.strategy)


@dataclass(frozen=True, eq=False)
class Federation:
    """What all rounds of a run have in common."""

    config: ExperimentConfig
    grid: Grid
    model: GlobalModel
    membership: Membership
    aggregator: Aggregator
    waiting: Waiting


def run_round(
    round_: int,
    tensors: dict[str, np.ndarray],
    participation: Participation,
    federation: Federation,
) -> tuple[dict[str, np.ndarray], RoundReport]:
    """Run one round and return the next global tensors (the same if no update was valid).

    The cohort is drawn from all partitions. A member of it that is not online, does not answer in
    time, fails, or is refused, is reported, and the round goes on with the others.
    """
    started = time.perf_counter()
    # 1. Draw a cohort, and ask those who are there. Who was drawn and who is asked is known here,
    #    before anything is sent.
    asked = _ask(round_, tensors, participation, federation)
    # 2. Wait for their replies, and screen them. Which updates count is known here, and what each
    #    of them is, while the global tensors are still those that were sent.
    replies = _collected(round_, tensors, asked, federation)
    # 3. Aggregate. The model before and after, and the updates between them, are known here.
    following = _aggregated(round_, tensors, replies, federation.aggregator)
    # 4. Report; the run logs it, evaluates, and writes a checkpoint (`server/run.py`).
    _warn(round_, replies)
    report = _reported(round_, asked, replies, federation, time.perf_counter() - started)
    return following, report


@dataclass(frozen=True, eq=False)
class _Asked:
    """Who was drawn, and what is asked of those of them that are there, by partition.

    `learning_rate`: the clients'.
    """

    cohort: list[int]
    members: Mapping[int, Member]
    order: Order
    learning_rate: float


def _ask(
    round_: int,
    tensors: dict[str, np.ndarray],
    participation: Participation,
    federation: Federation,
) -> _Asked:
    config, aggregator, model = federation.config, federation.aggregator, federation.model
    cohort = draw_cohort(
        range(config.partition.clients), config.cohort, seed=config.seed, round_=round_
    )
    federation.waiting.begin(round_)
    members = federation.membership.online(cohort, federation.waiting)
    rate = learning_rate(config.train, round_, config.rounds)
    instructions = aggregator.training_config(
        round_, tensors, ConfigRecord({ROUND: round_, LEARNING_RATE: rate})
    )
    fixed = {FIXED: model.fixed_sha256} if model.fixed_sha256 else {}
    order = Order(
        tensors=tensors,
        control=aggregator.control(tensors),
        parameters=model.parameters,
        data=data_summary(config),
        told={**instructions, **fixed},
        own={partition: participation.told(partition) for partition in members},
        nodes={partition: member.node_id for partition, member in members.items()},
    )
    return _Asked(cohort, members, order, rate)


def _collected(
    round_: int, tensors: dict[str, np.ndarray], asked: _Asked, federation: Federation
) -> Replies:
    """Return the replies, sorted out; those of the cohort who were not there have failed."""
    config, model, waiting = federation.config, federation.model, federation.waiting
    gate = Screen(
        tensors,
        {partition: member.examples for partition, member in asked.members.items()},
        config.train,
        max_norm=0.0 if config.server.max_update_norm == "auto" else config.server.max_update_norm,
        round_timeout=config.server.round_timeout,
        private=config.privacy.mechanism == "example",
        least_loss=model.task.least_loss,
        spreads=model.spreads,
        counts=model.counts,
        parameters=model.parameters,
    )
    waiting.begin(round_)
    grid, order = federation.grid, asked.order
    if isinstance(grid, DirectGrid):
        replies = collect_directly(grid, order, gate, config.server, waiting.look)
    else:
        replies = collect(grid, order.messages(grid), gate, config.server, waiting.look)
    waiting.end(replies.slowest)
    replies.refuse(too_far(replies.updates, tensors, model.parameters, config, round_))
    replies.failed.extend(
        {"client": partition, "reason": federation.membership.why_absent(partition)}
        for partition in asked.cohort
        if partition not in asked.members
    )
    return replies


def _aggregated(
    round_: int, tensors: dict[str, np.ndarray], replies: Replies, aggregator: Aggregator
) -> dict[str, np.ndarray]:
    """Return the next global tensors; where none can be made of the updates, refuse them all."""
    if not replies.updates:
        return tensors
    try:
        return aggregator.aggregate(round_, tensors, replies.updates)
    except NoAggregate as problem:
        replies.refuse({update.partition: str(problem) for update in replies.updates})
        return tensors


def _warn(round_: int, replies: Replies) -> None:
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


def _reported(
    round_: int, asked: _Asked, replies: Replies, federation: Federation, seconds: float
) -> RoundReport:
    membership = federation.membership
    return RoundReport(
        round_=round_,
        cohort=asked.cohort,
        updates=replies.updates,
        refused=replies.refused,
        failed=replies.failed,
        late=replies.late,
        strategy=federation.aggregator.fields() if replies.updates else {},
        bytes_down=asked.order.bytes_down * len(asked.members),
        bytes_up=replies.bytes,
        learning_rate=asked.learning_rate,
        seconds=seconds,
        waiting_seconds=membership.waited + replies.waited,
        waited_for=sorted({*membership.waited_for, *replies.waited_for}),
    )


def _client(entry: Mapping[str, Any]) -> int:
    return -1 if entry["client"] is None else int(entry["client"])
