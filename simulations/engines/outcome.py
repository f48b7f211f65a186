"""How an experiment ended, whatever the engine."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ArrayRecord, Context, RecordDict

from fedkn.config import ExperimentConfig
from fedkn.federation import ARRAYS, CONFIG, METRICS
from simulations.engines.identity import RUN_ID, SERVER_NODE

__all__ = ["Outcome", "outcome_in", "server_context"]


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended: the deciding metric's value and the loss, hash and arrays."""

    value: float
    loss: float
    weights_sha256: str
    arrays: ArrayRecord


def server_context(config: ExperimentConfig) -> Context:
    """Return the context in which the ServerApp runs `config`."""
    return Context(
        run_id=RUN_ID,
        node_id=SERVER_NODE,
        node_config={},
        state=RecordDict(),
        run_config=dict(config.flat()),
    )


def outcome_in(context: Context) -> Outcome:
    """Return what the ServerApp left in its context."""
    metrics = context.state.metric_records[METRICS]
    value, loss = metrics["value"], metrics["loss"]
    assert not isinstance(value, list)
    assert not isinstance(loss, list)
    return Outcome(
        value=float(value),
        loss=float(loss),
        weights_sha256=str(context.state.config_records[CONFIG]["weights-sha256"]),
        arrays=context.state.array_records[ARRAYS],
    )
