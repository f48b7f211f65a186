"""Flower's strategies, asked for their aggregation alone: no sampling, no wire.

Somebody's own gets the updates one by one, on the host. Those that fedkn offers by name work on the
stack that the updates lie in, wherever that is (`AfterTheMean`, `Combined`), whether they came in
messages or not; Flower's class holds the settings and what outlives a round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.app.exception import AppExitException
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy as FlwrStrategy
from flwr.supercore.run import Run

from fedkn.averaging import weighted_mean
from fedkn.errors import UserError
from fedkn.federation import ARRAYS, CONFIG, EXAMPLES, METRICS, TRAIN_LOSS
from server.gate.screening import Update
from server.strategies.base import Arrays, NoAggregate, Strategy

__all__ = ["EVERY_NODE", "AfterTheMean", "Combined", "FlowerStrategy", "quiet_flower"]

EVERY_NODE: dict[str, Any] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 0,
    "min_available_nodes": 1,
}
"""Arguments with which Flower's strategies train every node that they are shown."""


class FlowerStrategy(Strategy):
    """One of Flower's strategies, given the updates as it expects them.

    Args:
        strategy: trains every node that it is shown.
        parameters: the names of the shared parameters, in their order.
        metrics: the keys that it needs. It averages every metric that it finds, so it gets no more.
    """

    def __init__(
        self,
        strategy: FlwrStrategy,
        parameters: Sequence[str],
        metrics: Sequence[str] = (EXAMPLES, TRAIN_LOSS),
    ) -> None:
        self._strategy = strategy
        self._parameters = tuple(parameters)
        self._metrics = tuple(metrics)

    def instructions(self, round_: int, parameters: Arrays, config: ConfigRecord) -> ConfigRecord:
        """Return `config` with what the strategy adds to it; it notes the parameters."""
        with quiet_flower():
            messages = list(
                self._strategy.configure_train(round_, self._record(parameters), config, _OneNode())
            )
        if len(messages) != 1 or CONFIG not in messages[0].content.config_records:
            raise UserError(
                f"{type(self._strategy).__name__}.configure_train must return one message for each "
                f"node that it is shown, with the config under '{CONFIG}': fedkn draws the cohort"
            )
        return messages[0].content.config_records[CONFIG]

    def aggregate(
        self, round_: int, sent: Arrays, updates: Sequence[Update]
    ) -> dict[str, np.ndarray]:
        """Return what the strategy makes of the updates."""
        replies = []
        for update in updates:
            metrics = MetricRecord({key: update.metrics[key] for key in self._metrics})
            content = RecordDict({ARRAYS: self._record(update.arrays), METRICS: metrics})
            replies.append(Message(content, dst_node_id=1, message_type=MessageType.TRAIN))
        with quiet_flower(), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            try:
                record, _ = self._strategy.aggregate_train(round_, replies)
            except (AppExitException, ArithmeticError) as error:
                raise NoAggregate(str(error)) from error
        if record is None:
            raise NoAggregate(f"{len(updates)} updates are too few for the strategy")
        if not self._parameters:
            return {}
        size = sum(sent[name].size for name in self._parameters)
        if list(record) != [_ALL] or record[_ALL].numpy().size != size:
            raise UserError(
                f"{type(self._strategy).__name__}.aggregate_train must return an ArrayRecord of "
                f"the one array '{_ALL}' that the updates have, of {size} numbers"
            )
        return self._named(record[_ALL].numpy(), sent)

    def state(self) -> dict[str, np.ndarray]:
        """Return momentum and second moments, by attribute, of all parameters in their order."""
        arrays: dict[str, np.ndarray] = {}
        for attribute, kind in _STATE.items():
            if value := getattr(self._strategy, attribute, None):
                arrays[attribute] = value[_ALL] if kind is dict else value[0]
        return arrays

    def load_state(self, arrays: Arrays) -> None:
        """Restore what `state` returned.

        Raises:
            UserError: it is that of another version of fedkn, which kept it by parameter.
        """
        for attribute, kind in _STATE.items():
            if any(key.startswith(f"{attribute}/") for key in arrays):
                raise UserError(
                    "the checkpoint's server optimizer was written by an older version of fedkn: "
                    "go on with that version, or start anew in another folder"
                )
            if attribute in arrays:
                value = arrays[attribute]
                setattr(self._strategy, attribute, {_ALL: value} if kind is dict else [value])

    def _record(self, arrays: Arrays) -> ArrayRecord:
        """Return the parameters end to end as one array: most models have dozens of tiny ones."""
        record = ArrayRecord()
        if self._parameters:
            parts = [arrays[name].reshape(-1) for name in self._parameters]
            record[_ALL] = _Held(np.concatenate(parts))
        return record

    def _named(self, flat: np.ndarray, like: Arrays) -> dict[str, np.ndarray]:
        """Return the parameters in `flat`, in the shapes of `like`: views."""
        named: dict[str, np.ndarray] = {}
        begin = 0
        for name in self._parameters:
            end = begin + like[name].size
            named[name] = flat[begin:end].reshape(like[name].shape)
            begin = end
        return named


class AfterTheMean(FlowerStrategy):
    """One of Flower's server optimizers, which step from the updates' mean by examples.

    It gets that mean as the round's one update: taken on the stack, with the bits of Flower's own.
    """

    def aggregate(
        self, round_: int, sent: Arrays, updates: Sequence[Update]
    ) -> dict[str, np.ndarray]:
        """Return what the strategy makes of the updates' mean."""
        examples = [update.metrics[EXAMPLES] for update in updates]
        mean = weighted_mean([update.arrays for update in updates], examples, self._parameters)
        alone = {**dict.fromkeys(self._metrics, 0.0), EXAMPLES: sum(examples)}
        return super().aggregate(round_, sent, [Update(updates[0].partition, mean, alone)])


Combine = Callable[[Any, Arrays, Sequence[Update]], dict[str, np.ndarray]]
"""From one of Flower's strategies, whose settings it reads, the parameters sent and the updates to
the next parameters, in float64 or their own dtype; raises `NoAggregate` where there are too few."""


class Combined(FlowerStrategy):
    """One of Flower's strategies, of which the aggregation is done on the stack by `combine`."""

    def __init__(self, strategy: FlwrStrategy, parameters: Sequence[str], combine: Combine) -> None:
        super().__init__(strategy, parameters)
        self._combine = combine

    def aggregate(
        self, round_: int, sent: Arrays, updates: Sequence[Update]
    ) -> dict[str, np.ndarray]:
        """Return the updates combined."""
        del round_
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return self._combine(self._strategy, sent, updates)


# The name of the one array that the strategies see.
_ALL = "parameters"

# Where Flower's strategies keep what must outlive a round, and how: FedAdam and its kin by name,
# FedAvgM in the order of the arrays.
_STATE: dict[str, type] = {"m_t": dict, "v_t": dict, "momentum_vector": list}


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Silence Flower's strategies: what they log of nodes and replies is true of our stand-ins."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Held(Array):
    """An array that is not on its way anywhere: kept as it is, where Flower would serialize it."""

    def __init__(self, value: np.ndarray) -> None:
        super().__init__(str(value.dtype), value.shape, "numpy.ndarray", b"")
        self._held = value

    def numpy(self) -> np.ndarray:
        # A copy, as from Flower's own: QFedAvg writes into it.
        return self._held.copy()


class _OneNode(Grid):
    """A grid of one node: enough for a strategy to make the message of which we take the config.

    Cohorts are drawn by us: Flower's strategies draw theirs from the global generator.
    """

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [1]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=1)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError
