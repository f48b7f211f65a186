"""Every client's own model on its own held-out examples: what the clients themselves get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedkn.config import ExperimentConfig
from fedkn.experiment import data_summary, task_of
from fedkn.federation import (
    ARRAYS,
    CONFIG,
    DATA,
    EVALUATION_LOSS,
    EXAMPLES,
    FIXED,
    METRICS,
    PARTITION,
    VALUE,
    data_record,
    failure_reason,
)
from fedkn.tasks import Metric
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
        clients: per client ``{"client", "examples", "value", "loss"}``, ordered by client.
        failed: ``{"client", "reason"}`` of those who gave no usable answer.
        metric: what the values are of.
    """

    clients: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    metric: Metric

    def fields(self) -> dict[str, Any]:
        """Return the fields of the log's line, figures of the values; each client counts once.

        ``worst_tenth`` is the mean over the tenth of the clients that do worst (at least one).
        """
        sign = self.metric.sign
        values = sorted((entry["value"] for entry in self.clients), key=lambda value: sign * value)
        worst = values[: max(1, len(values) // 10)]
        losses = [entry["loss"] for entry in self.clients]
        return {
            "mean": float(np.mean(values)) if values else None,
            "worst_tenth": float(np.mean(worst)) if worst else None,
            "deviation": float(np.std(values)) if values else None,
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
    fraction, task = config.evaluation.client_fraction, task_of(config)
    members = membership.online(everyone)
    content: dict[str, ArrayRecord | ConfigRecord] = {
        ARRAYS: sent_through(grid, tensors),
        DATA: data_record(data_summary(config)),
    }
    fixed = {FIXED: fixed_sha256} if fixed_sha256 else {}
    told = participation.told
    messages = {
        partition: Message(
            RecordDict({**content, CONFIG: ConfigRecord({**fixed, **told(partition)})}),
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
            ranges = evaluation_ranges(fraction, partition, member.examples, task)
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
        task.metric,
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
    names = {"client": PARTITION, "examples": EXAMPLES, "value": VALUE, "loss": EVALUATION_LOSS}
    return {name: found[key] for name, key in names.items()}
