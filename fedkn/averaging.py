"""The arithmetic of a round's end: clients' tensors averaged, their means and variances pooled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkn.errors import UserError
from fedkn.normalizers import TensorRole
from fedkn.stack import rows_of

__all__ = ["moment_pairs", "pool_moments", "summed", "weighted_mean", "weighted_sum"]

Arrays = Mapping[str, np.ndarray]


def weighted_mean(
    states: Sequence[Arrays], weights: Sequence[float], names: Iterable[str]
) -> dict[str, np.ndarray]:
    """Return sum_k (w_k / w) a_k, w = sum_k w_k, for the arrays `names` of the clients' `states`.

    Summed in their own dtype and order, as Flower's FedAvg does, to the bit; what such a dtype
    cannot hold becomes infinite, which is for the caller to notice. Rows of a `Stack` are summed on
    its device, and the mean alone is fetched.
    """
    whole = sum(weights)
    shares = [weight / whole for weight in weights]
    mean: dict[str, np.ndarray] = {}
    for layout, run, rows in rows_of(states, names):
        # Rounded to their dtype, as NumPy does.
        factors = torch.tensor(shares, dtype=rows[0].dtype, device=rows[0].device)
        total = rows[0] * factors[0]
        share = torch.empty_like(total)
        for row, factor in zip(rows[1:], factors[1:], strict=True):
            total.add_(torch.mul(row, factor, out=share))
        mean |= layout.named(run, total.cpu().numpy())
    return mean


def weighted_sum(
    states: Sequence[Arrays], weights: Sequence[float], names: Iterable[str]
) -> dict[str, np.ndarray]:
    """Return sum_k w_k a_k, in float64, for the arrays `names` of the clients' `states`."""
    return summed(states, names, lambda client, row: row.double() * weights[client])


def summed(
    states: Sequence[Arrays],
    names: Iterable[str],
    term: Callable[..., Tensor],
    *beside: Arrays,
) -> dict[str, np.ndarray]:
    """Return the sum over clients of their `term`, in float64, for the arrays `names`.

    The bits are those of `numpy.sum` over the first axis, for each array by itself.

    Args:
        term: ``term(client, row, *beside)`` returns what is added, float64 (n,), for the numbers
            `row` (n,) of the client at this place.
        beside: other arrays of these names, which `term` is given in float64, (n,) too.
    """
    found: dict[str, np.ndarray] = {}
    for layout, run, rows in rows_of(states, names):
        given = [layout.joined(one, run, rows[0].device, torch.float64) for one in beside]
        # NumPy adds up single numbers in pairs, and all others client by client to zero.
        single = [name for name in run.names if math.prod(layout.place(name)[3]) == 1]
        columns = [layout.place(name)[1] - run.begin for name in single]
        kept: list[Tensor] = []
        total = torch.zeros_like(rows[0], dtype=torch.float64)
        for client, row in enumerate(rows):
            added = term(client, row, *given)
            total.add_(added)
            if single:
                kept.append(added[columns])
        found |= layout.named(run, total.cpu().numpy())
        if single:
            alone = torch.stack(kept, dim=1).cpu().numpy()
            for name, values in zip(single, alone, strict=True):
                found[name] = np.asarray(np.sum(values.reshape(-1, *layout.place(name)[3]), axis=0))
    return found


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
