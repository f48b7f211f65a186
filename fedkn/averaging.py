"""The arithmetic of a round's end: clients' tensors averaged, their means and variances pooled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import numpy as np

from fedkn.errors import UserError
from fedkn.normalizers import TensorRole

__all__ = ["moment_pairs", "pool_moments", "weighted_mean", "weighted_sum"]

Arrays = Mapping[str, np.ndarray]


def weighted_mean(
    states: Sequence[Arrays], weights: Sequence[float], names: Iterable[str]
) -> dict[str, np.ndarray]:
    """Return sum_k (w_k / w) a_k, w = sum_k w_k, for the arrays `names` of the clients' `states`.

    Summed in their own dtype and order, as Flower's FedAvg does, to the bit; what such a dtype
    cannot hold becomes infinite, which is for the caller to notice.
    """
    total = sum(weights)
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            name: reduce(
                np.add,
                (
                    np.multiply(state[name], weight / total, dtype=state[name].dtype)
                    for state, weight in zip(states, weights, strict=True)
                ),
            )
            for name in names
        }


def weighted_sum(
    states: Sequence[Arrays], weights: Sequence[float], names: Iterable[str]
) -> dict[str, np.ndarray]:
    """Return sum_k w_k a_k, in float64, for the arrays `names` of the clients' `states`."""
    return {
        name: np.sum(
            [
                state[name].astype(np.float64) * weight
                for state, weight in zip(states, weights, strict=True)
            ],
            axis=0,
        )
        for name in names
    }


def moment_pairs(rule: Mapping[str, TensorRole]) -> list[tuple[str, str]]:
    """Return the names (mean, variance) of each module that has them, in the order of `rule`.

    Raises:
        UserError: a mean or variance of a module without exactly one of the other.
    """
    found: dict[str, dict[TensorRole, list[str]]] = {}
    for name, role in rule.items():
        if role in (TensorRole.MEAN, TensorRole.VARIANCE):
            module = name.rpartition(".")[0]
            found.setdefault(module, {}).setdefault(role, []).append(name)
    pairs = []
    for module, names in found.items():
        means = names.get(TensorRole.MEAN, [])
        variances = names.get(TensorRole.VARIANCE, [])
        if len(means) != 1 or len(variances) != 1:
            raise UserError(
                f"module '{module}' has {len(means)} means and {len(variances)} variances to "
                "pool: the normalizer's role_of must give it one of each"
            )
        pairs.append((means[0], variances[0]))
    return pairs


def pool_moments(
    pairs: Sequence[tuple[str, str]],
    sent: Arrays,
    updates: Sequence[Arrays],
    weights: Sequence[float],
    momentum: float,
) -> dict[str, np.ndarray]:
    """Return the next global value of every tensor in `pairs`, by name.

    With weights w_k that sum to one, and what the server `sent` as mu_g and var_g::

        mu = sum w_k mu_k                     mu_g'  = (1 - momentum) mu_g  + momentum mu
        var = sum w_k (var_k + (mu_k - mu)^2) var_g' = (1 - momentum) var_g + momentum var

    which, with biased variances and weights proportional to the numbers of values, are the moments
    of all clients' values together. Computed in float64, returned in the dtypes of `sent`; a value
    beyond such a dtype becomes infinite, which is for the caller to notice.

    Args:
        updates, weights: one of each for every client, at least one; weights are examples,
            none negative, not all zero.
    """
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    following: dict[str, np.ndarray] = {}
    for mean_name, variance_name in pairs:
        means = np.stack([np.asarray(u[mean_name], np.float64) for u in updates])
        variances = np.stack([np.asarray(u[variance_name], np.float64) for u in updates])
        mean = np.tensordot(shares, means, 1)
        variance = np.tensordot(shares, variances + (means - mean) ** 2, 1)
        for name, pooled in ((mean_name, mean), (variance_name, variance)):
            before = sent[name].astype(np.float64)
            with np.errstate(over="ignore"):
                value = (1 - momentum) * before + momentum * pooled
                following[name] = value.astype(sent[name].dtype)
    return following
