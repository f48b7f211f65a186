"""How far an update may lie from what was sent, by what the others of its round do.

Nothing in a well-formed update says that it is one client's share: a single one of 1e30 is the next
global model. docs/strategies.md has what honest updates were measured to do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from fedkn.config import ExperimentConfig, TrainConfig
from fedkn.federation import TRAIN_LOSS
from fedkn.stack import distances
from fedkn.training import learning_rate
from server.gate.screening import Update

__all__ = ["FACTOR", "FLOOR", "farthest_step", "too_far"]

FACTOR, FLOOR = 10.0, 0.5
"""An update may move the weights so many times as far as the median one of its round does, or by
this part of the norm of what was sent, whichever is more."""

# Running statistics of models that diverge, as in a search for learning rates, lie far apart.
_STATISTICS_FACTOR = 1000.0

# q-FedAvg weighs updates by a power of the losses that clients report (nats).
_LOSS_FACTOR, _LOSS_FLOOR = 1000.0, 100.0
# They divide what a client sends by the steps that it says it took.
_BY_STEP = ("fednova", "scaffold")


def too_far(
    updates: Sequence[Update],
    sent: Mapping[str, np.ndarray],
    parameters: Collection[str],
    config: ExperimentConfig,
    round_: int,
) -> dict[int, str]:
    """Return for every update that moves too far its partition and why.

    Norms are Euclidean, over all `parameters` together, and over all other tensors together; the
    median is the lower of the middle two, so that of two updates the shorter is the measure. An
    update that is alone is held against nothing but `farthest_step`, which holds for all.

    Only with ``server.max_update_norm`` = "auto"; not where privacy of clients clips updates: which
    of them counts must there not depend on the others.
    """
    server, privacy = config.server, config.privacy
    if server.max_update_norm != "auto" or privacy.mechanism.startswith(("server_", "client_")):
        return {}
    own = [name for name in sent if name in parameters]
    others = [name for name in sent if name not in parameters]
    refused: dict[int, str] = {}

    def judge(moves: Sequence[float], names: Sequence[str], what: str, factor: float) -> None:
        floor = FLOOR * _norm(sent[name] for name in names)
        most = max(factor * _lower_median(moves), floor)
        for update, move in zip(updates, moves, strict=True):
            if move > most:
                refused.setdefault(
                    update.partition,
                    f"moves {what} by {move:.3g}: {most:.3g} at most, {factor:g} times the "
                    f"round's median or {FLOOR:g} of the norm of what was sent",
                )

    ends = [update.arrays for update in updates]
    moves = distances(ends, sent, own)
    if (farthest := _farthest(config, round_, updates, sent, own)) is not None:
        for update, move, most in zip(updates, moves, farthest, strict=True):
            if move > most:
                refused[update.partition] = (
                    f"moves the weights by {move:.3g}: its steps can by {most:.3g} at most "
                    "(train.clip_norm)"
                )
    judge(moves, own, "the weights", FACTOR)
    judge(distances(ends, sent, others), others, "the statistics", _STATISTICS_FACTOR)
    if config.strategy.name == "qfedavg":
        losses = [update.metrics[TRAIN_LOSS] for update in updates]
        most = max(_LOSS_FACTOR * _lower_median(losses), _LOSS_FLOOR)
        for update, loss in zip(updates, losses, strict=True):
            if loss > most:
                text = f"claims a loss of {loss:.3g}, which would be its weight: {most:.3g} at most"
                refused.setdefault(update.partition, text)
    if config.strategy.name in _BY_STEP:
        steps = [update.metrics["steps"] for update in updates]
        mean = sum(steps) / len(steps) if steps else 0.0
        each = [move * mean / taken for move, taken in zip(moves, steps, strict=True)]
        judge(each, own, "the weights, for the steps that it claims,", FACTOR)
    return refused


def farthest_step(train: TrainConfig, rate: float, start: float) -> float:
    """Return how far one local step can move the weights, ``inf`` without ``train.clip_norm``.

    The gradient is clipped to C, then weight decay adds d·|w|; the velocity of momentum m is at
    most the sum of a geometric series of them. So a step is at most rate·(C + d·|w|)/(1 - m).

    Args:
        rate: the local learning rate. start: |w|, the norm of the weights before the step.
    """
    if not train.clip_norm:
        return math.inf
    return rate * (train.clip_norm + train.weight_decay * start) / (1 - train.momentum)


def _farthest(
    config: ExperimentConfig,
    round_: int,
    updates: Sequence[Update],
    sent: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> list[float] | None:
    """Return for every update how far its steps can have led; None where nothing bounds them.

    SCAFFOLD's correction and the noise of DP-SGD are added to the gradient after it is clipped.
    """
    train = config.train
    unbounded = config.strategy.name == "scaffold" or config.privacy.mechanism == "example"
    if unbounded or not train.clip_norm:
        return None
    rate = learning_rate(train, round_, config.rounds)
    start = _norm(sent[name] for name in names)
    growth = rate * train.weight_decay / (1 - train.momentum)
    found = []
    for update in updates:
        steps, first = update.metrics["steps"], farthest_step(train, rate, start)
        try:
            moved = first * (((1 + growth) ** steps - 1) / growth if growth else steps)
        except OverflowError:
            moved = math.inf
        # Float32 rounds at every step.
        found.append(1.01 * moved + 1e-6 * start)
    return found


def _norm(arrays: Iterable[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(a.astype(np.float64)).sum()) for a in arrays))


def _lower_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2] if values else 0.0
