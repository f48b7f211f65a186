"""Every client's own model on its own held-out images: what the clients themselves get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedkn.config import ExperimentConfig
from fedkn.experiment import data_summary
from fedkn.federation import (
    ARRAYS,
    CONFIG,
    CORRECT,
    DATA,
    EVALUATION_LOSS,
    EXAMPLES,
    FIXED,
    METRICS,
    PARTITION,
    data_record,
    failure_reason,
)
from fedkn.text import printable
from server.gate.exchange import exchange
from server.gate.plausible import Range, evaluation_ranges, named, numbers_in
from server.rounds.membership import Membership
from server.rounds.participation import Participation
from server.wire import sent_through

__all__ = ["ClientEvaluation", "evaluate_clients"]


@dataclass(frozen=True)
class ClientEvaluation:
    """How the clients' own models do.

    Attributes:
        clients: per client ``{"client", "examples", "correct", "loss"}``, ordered by client.
        failed: ``{"client", "reason"}`` of those who gave no usable answer.
    """

    clients: list[dict[str, Any]]
    failed: list[dict[str, Any]]

    def fields(self) -> dict[str, Any]:
        """Return the fields of the log's line: accuracies are fractions, each client counts once.

        ``worst_tenth`` is the mean over the tenth of the clients that do worst (at least one).
        """
        accuracies = sorted(entry["correct"] / entry["examples"] for entry in self.clients)
        worst = accuracies[: max(1, len(accuracies) // 10)]
        losses = [entry["loss"] for entry in self.clients]
        return {
            "mean": float(np.mean(accuracies)) if accuracies else None,
            "worst_tenth": float(np.mean(worst)) if worst else None,
            "deviation": float(np.std(accuracies)) if accuracies else None,
            "loss": float(np.mean(losses)) if losses else None,
            "clients": self.clients,
            "failed": self.failed,
        }


def evaluate_clients(
    tensors: Mapping[str, np.ndarray],
    participation: Participation,
    *,
    config: ExperimentConfig,
    grid: Grid,
    membership: Membership,
    fixed_sha256: str = "",
) -> ClientEvaluation:
    """Let every client that is online evaluate the global `tensors` with its own."""
    everyone = range(config.partition.clients)
    fraction = config.evaluation.client_fraction
    members = membership.online(everyone)
    content: dict[str, ArrayRecord | ConfigRecord] = {
        ARRAYS: sent_through(grid, tensors),
        DATA: data_record(data_summary(config)),
    }
    fixed = {FIXED: fixed_sha256} if fixed_sha256 else {}
    messages = {
        partition: Message(
            RecordDict({**content, CONFIG: ConfigRecord({**fixed, **participation.told(partition)})}),
            dst_node_id=member.node_id,
            message_type=MessageType.EVALUATE,
        )
        for partition, member in members.items()
    }
    arriving = exchange(grid, list(messages.values()), config.server.round_timeout)
    asked = {message.metadata.message_id: partition for partition, message in messages.items()}
    clients: dict[int, dict[str, Any]] = {}
    reasons = {partition: "not online" for partition in everyone if partition not in members}
    # Whoever has answered, well or badly, is heard: a second answer counts for nothing.
    waiting = set(messages)
    reasons |= dict.fromkeys(waiting, "no reply")
    for arrived in arriving:
        for message_id, reason in arrived.lost.items():
            if (partition := asked.get(message_id)) in waiting:
                waiting.remove(partition)
                reasons[partition] = printable(reason)
        for reply in arrived.replies:
            if (partition := asked.get(reply.metadata.reply_to_message_id)) not in waiting:
                continue
            waiting.remove(partition)
            member = members[partition]
            ranges = evaluation_ranges(fraction, partition, member.examples)
            try:
                metrics = _answer(reply, partition)
                if reply.metadata.src_node_id != member.node_id:
                    raise ValueError("an answer of a node that was not asked")
                clients[partition] = _figures(metrics, ranges)
                del reasons[partition]
            except ValueError as error:
                reasons[partition] = printable(error)
    return ClientEvaluation(
        [clients[partition] for partition in sorted(clients)],
        [{"client": partition, "reason": reasons[partition]} for partition in sorted(reasons)],
    )


def _answer(reply: Message, partition: int) -> MetricRecord:
    """Return what client `partition` says of its model, the numbers as it sent them."""
    if reply.has_error():
        raise ValueError(failure_reason(reply))
    records = dict(reply.content) if reply.has_content() else {}
    metrics = records.get(METRICS)
    if records.keys() != {METRICS} or not isinstance(metrics, MetricRecord):
        raise ValueError(f"expected one record '{METRICS}', got {named(records) or 'none'}")
    if metrics.get(PARTITION) != partition:
        raise ValueError(f"claims to be partition {metrics.get(PARTITION)}")
    return metrics


def _figures(metrics: MetricRecord, ranges: Mapping[str, Range]) -> dict[str, Any]:
    found = numbers_in(metrics, ranges)
    examples, correct = found[EXAMPLES], found[CORRECT]
    if correct > examples:
        raise ValueError(f"impossible figures: {correct} of {examples} correct")
    loss = found[EVALUATION_LOSS]
    return {"client": found[PARTITION], "examples": examples, "correct": correct, "loss": loss}
