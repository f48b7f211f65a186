"""From the valid updates of a round to the next global tensors, as the federation rule says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord

from fedkn.averaging import moment_pairs, pool_moments, weighted_sum
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.federation import EXAMPLES
from fedkn.normalizers import FederationRule, TensorRole
from fedkn.text import printable
from server.gate.screening import Update
from server.strategies.base import Arrays, NoAggregate
from server.strategies.registry import create_strategy

__all__ = ["Aggregator", "NoAggregate"]


class Aggregator:
    """Applies a strategy to the shared parameters, and its own rule to every other tensor.

    A server optimizer such as FedAdam is meant for parameters: run on BatchNorm's running variance
    it makes it negative. So shared buffers are averaged by examples, whatever the strategy; means
    and variances are pooled by examples; frozen tensors stay the server's.

    Args:
        config: names the strategy, which sees the parameters alone.
        rule: the role of every tensor of the model in a round, and the weight of what it pools.
        parameters: the names that are parameters.

    Raises:
        UserError: statistics are averaged beside parameters that privacy.mechanism protects.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        rule: Callable[[int], FederationRule],
        parameters: Iterable[str],
    ) -> None:
        self._config = config
        self._rule = rule
        trainable = set(parameters)
        roles = rule(1)
        self._parameters = [
            name for name, role in roles.items() if role is TensorRole.SHARED and name in trainable
        ]
        if config.privacy.mechanism.startswith(("server_", "client_")):
            _refuse_statistics(config, roles, trainable)
        self._strategy = create_strategy(config, self._parameters)

    def training_config(self, round_: int, tensors: Arrays, config: ConfigRecord) -> ConfigRecord:
        """Return `config` with what the strategy adds to it; it notes the global parameters."""
        return self._strategy.instructions(round_, self._only_parameters(tensors), config)

    def control(self, tensors: Arrays) -> dict[str, np.ndarray]:
        """Return what the strategy sends beside the global `tensors`, by parameter; often none."""
        return self._strategy.control(self._only_parameters(tensors))

    def aggregate(
        self, round_: int, sent: Arrays, updates: Sequence[Update]
    ) -> dict[str, np.ndarray]:
        """Return the next global tensors, in the order, shapes and dtypes of `sent`.

        The result depends on the order of the `updates`, because float sums do: give them sorted.

        Raises:
            NoAggregate: too few updates for the strategy, or finite ones whose combination is not.
                The strategy is then as it was before.
        """
        before = self.state()
        try:
            made = self._made(round_, sent, updates)
            # Some strategies compute in float64; the model, and the next gate, know one dtype.
            with np.errstate(over="ignore"):
                following = {
                    name: np.asarray(made.get(name, value), dtype=value.dtype)
                    for name, value in sent.items()
                }
            for name, value in {**following, **self.state()}.items():
                if not np.isfinite(value).all():
                    raise NoAggregate(
                        f"strategy '{printable(self._config.strategy.name, 60)}' makes "
                        f"'{printable(name, 60)}' infinite or NaN of updates that are finite: they "
                        "overflow together, or it divides by 0"
                    )
        except NoAggregate:
            self._strategy = create_strategy(self._config, self._parameters)
            self.load_state(before)
            raise
        return following

    def state(self) -> dict[str, np.ndarray]:
        """Return the strategy's own arrays (momentum, control variates) for a checkpoint."""
        return self._strategy.state()

    def load_state(self, arrays: Arrays) -> None:
        """Restore what `state` returned."""
        self._strategy.load_state(arrays)

    def fields(self) -> dict[str, Any]:
        """Return what the strategy adds to the log's line of the last aggregated round."""
        return self._strategy.fields()

    def _only_parameters(self, tensors: Arrays) -> dict[str, np.ndarray]:
        return {name: tensors[name] for name in self._parameters}

    def _made(self, round_: int, sent: Arrays, updates: Sequence[Update]) -> Arrays:
        """Return the tensors of the next global model that this round is to change."""
        rule = self._rule(round_)
        shared = [name for name, role in rule.items() if role is TensorRole.SHARED]
        total = sum(update.metrics[EXAMPLES] for update in updates)
        weights = [update.metrics[EXAMPLES] / total for update in updates]
        parameters = self._strategy.aggregate(round_, self._only_parameters(sent), updates)
        arrays = [update.arrays for update in updates]
        buffers = weighted_sum(arrays, weights, set(shared) - set(self._parameters))
        made = {name: parameters[name] if name in parameters else buffers[name] for name in shared}
        return made | pool_moments(moment_pairs(rule), sent, arrays, weights, rule.pooling_weight)


def _refuse_statistics(
    config: ExperimentConfig, roles: Mapping[str, TensorRole], parameters: set[str]
) -> None:
    pooled = (TensorRole.MEAN, TensorRole.VARIANCE)
    for name, role in roles.items():
        if role in pooled or (role is TensorRole.SHARED and name not in parameters):
            raise UserError(
                f"privacy.mechanism = '{config.privacy.mechanism}' protects parameters, but the "
                f"'{config.normalizer.name}' normalizer averages the clients' statistics as well "
                f"('{name}'): set normalizer.name to one without shared statistics, such as "
                "'kernel', 'group' or 'fedbn'"
            )
