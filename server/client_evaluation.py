"""Every client's own model on its own held-out images: what the clients themselves get."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedkn.config import ExperimentConfig
from fedkn.experiment import data_summary
from fedkn.federation import (
    ARRAYS,
    CONFIG,
    CORRECT,
    DATA,
    EVALUATION_LOSS,
    EVALUATION_METRICS,
    EXAMPLES,
    METRICS,
    PARTITION,
    data_record,
    failure_reason,
)
from server.exchange import exchange
from server.membership import Membership
from server.participation import Participation
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
) -> ClientEvaluation:
    """Let every client that is online evaluate the global `tensors` with its own."""
    everyone = range(config.partition.clients)
    members = membership.online(everyone)
    content: dict[str, ArrayRecord | ConfigRecord] = {
        ARRAYS: sent_through(grid, tensors),
        DATA: data_record(data_summary(config)),
    }
    messages = {
        partition: Message(
            RecordDict({**content, CONFIG: ConfigRecord(dict(participation.told(partition)))}),
            dst_node_id=member.node_id,
            message_type=MessageType.EVALUATE,
        )
        for partition, member in members.items()
    }
    arriving = exchange(grid, list(messages.values()), config.server.round_timeout)
    asked = {message.metadata.message_id: partition for partition, message in messages.items()}
    clients: dict[int, dict[str, Any]] = {}
    reasons = {partition: "not online" for partition in everyone if partition not in members}
    reasons |= dict.fromkeys(messages, "no reply")
    for arrived in arriving:
        reasons |= {asked[message_id]: reason for message_id, reason in arrived.lost.items()}
        for reply in arrived.replies:
            partition = asked.get(reply.metadata.reply_to_message_id, -1)
            try:
                clients[partition] = _answer(reply, partition)
                reasons.pop(partition, None)
            except ValueError as error:
                reasons[partition] = str(error)
    return ClientEvaluation(
        [clients[partition] for partition in sorted(clients)],
        [{"client": partition, "reason": reasons[partition]} for partition in sorted(reasons)],
    )


def _answer(reply: Message, partition: int) -> dict[str, Any]:
    if reply.has_error():
        raise ValueError(failure_reason(reply))
    metrics = reply.content.metric_records.get(METRICS) if reply.has_content() else None
    if metrics is None or metrics.keys() != set(EVALUATION_METRICS):
        raise ValueError("metrics missing or not expected")
    examples, correct, loss = (metrics[key] for key in (EXAMPLES, CORRECT, EVALUATION_LOSS))
    if metrics[PARTITION] != partition:
        raise ValueError(f"claims to be partition {metrics[PARTITION]}")
    if not (isinstance(examples, int) and isinstance(correct, int) and isinstance(loss, float)):
        raise ValueError("counts that are no integers, or a loss that is no number")
    if not (0 <= correct <= examples and examples > 0 and math.isfinite(loss)):
        raise ValueError(f"impossible figures: {correct} of {examples} correct, loss {loss}")
    return {"client": partition, "examples": examples, "correct": correct, "loss": loss}
