"""``python -m tests.server.update_norms``: how far honest updates lie apart (docs/strategies.md).

For every experiment below, over all its rounds: the largest norm of an update's move over the
round's median (the lower of the middle two), of parameters, of these by local step, and of the
other tensors that travel; the largest move of the parameters over the norm of what was sent; and
the largest part of what ``server.max_update_norm = "auto"`` allows, which is below 1 where no
honest update is refused.
"""

# ruff: noqa: T201 - this prints its figures

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from flwr.app import ArrayRecord, Message

from fedkn.errors import FedknError
from fedkn.federation import ARRAYS, METRICS
from server.global_model import GlobalModel
from server.run import run_server
from tests.server.fake_grid import FakeGrid, small

COMMON = {
    "partition.clients": 20,
    "cohort": 8,
    "rounds": 8,
    "partition.scheme": "dirichlet",
    "partition.alpha": 0.3,
    "train.local_steps": 0,
    "model.width": 8,
    "normalizer.name": "kernel",
    "model.final_norm": "kernel",
    "evaluation.every": 100,
    "server.max_update_norm": 0,
    "server.max_failed_rounds": 100,
}

CASES = {
    "defaults": {},
    "iid": {"partition.scheme": "iid"},
    "alpha 0.1": {"partition.alpha": 0.1},
    "alpha 0.1, batch 1": {"partition.alpha": 0.1, "train.batch_size": 1},
    "alpha 0.01, 5 epochs": {"partition.alpha": 0.01, "train.local_epochs": 5},
    "shards 1": {"partition.scheme": "shards", "partition.shards_per_client": 1},
    "sizes, sigma 2": {"partition.scheme": "quantity", "partition.sigma": 2.0},
    "momentum 0.9, cosine": {"train.momentum": 0.9, "train.schedule": "cosine"},
    "rate 0.001": {"train.learning_rate": 0.001, "partition.alpha": 0.1},
    "rate 1": {"train.learning_rate": 1.0, "partition.alpha": 0.1},
    "rate 5": {"train.learning_rate": 5.0, "partition.alpha": 0.1},
    "rate 0.3, no clipping": {"train.learning_rate": 0.3, "train.clip_norm": 0.0},
    "no norm, rate 0.5": {"train.learning_rate": 0.5, "normalizer.name": "none"},
    "batch norm, alpha 0.1": {
        "normalizer.name": "batch",
        "partition.alpha": 0.1,
        "train.batch_size": 4,
    },
    "batch norm, rate 2": {
        "normalizer.name": "batch",
        "train.learning_rate": 2.0,
        "train.batch_size": 4,
    },
    "fbn": {"normalizer.name": "fbn", "partition.alpha": 0.1, "train.batch_size": 4},
    "fednova, alpha 0.1": {"strategy.name": "fednova", "partition.alpha": 0.1},
    "fednova, sizes": {
        "strategy.name": "fednova",
        "partition.scheme": "quantity",
        "partition.sigma": 2.0,
    },
    "scaffold, alpha 0.1": {"strategy.name": "scaffold", "partition.alpha": 0.1},
    "fedprox, mu 1": {"strategy.name": "fedprox", "strategy.proximal_mu": 1.0},
    "fedadam": {"strategy.name": "fedadam"},
    "cohort 2": {"cohort": 2, "partition.alpha": 0.1},
    "converged": {"rounds": 40, "partition.alpha": 0.1, "train.learning_rate": 0.2},
    "sizes, 3, 3 epochs": {
        "partition.scheme": "quantity",
        "partition.sigma": 3.0,
        "train.local_epochs": 3,
        "train.momentum": 0.9,
    },
    "DP-SGD": {"privacy.mechanism": "example", "train.batch_size": 8},
}


def main(chosen: list[str]) -> None:
    """Print a line for each of the experiments, or for those that are named."""
    print(f"{'':24} {'params':>8} {'by step':>8} {'others':>8} {'move':>8} {'of bound':>8}")
    for name, changes in CASES.items():
        if chosen and name not in chosen:
            continue
        figures = " ".join(f"{value:8.2f}" for value in measured(changes))
        print(f"{name:24} {figures}", flush=True)


def measured(changes: Mapping[str, object]) -> tuple[float, ...]:
    """Return the five figures of an experiment."""
    config = small(**{key.replace(".", "__"): v for key, v in {**COMMON, **changes}.items()})
    parameters = set(GlobalModel(config).parameters)
    rounds: dict[int, list[tuple[float, ...]]] = defaultdict(list)

    def note(round_: int, partition: int, message: Message, reply: Message) -> Iterable[Message]:
        if reply.has_content():
            sent, got = (m.content.array_records[ARRAYS] for m in (message, reply))
            steps = reply.content.metric_records[METRICS]["steps"]
            rounds[round_].append((*_moves(sent, got, parameters), steps))
        return [reply]

    try:
        run_server(FakeGrid(config, note), config)
    except FedknError as error:
        print("  ", str(error)[:150])
    by_step = config.strategy.name in ("fednova", "scaffold")
    each = np.array([_figures(np.array(found).T, by_step) for found in rounds.values()])
    return tuple(each.max(axis=0))


def _moves(
    sent: ArrayRecord, got: ArrayRecord, parameters: set[str]
) -> tuple[float, float, float, float]:
    """Return the norms of the moves of parameters and of others, and of what was sent of both."""
    squares = np.zeros((2, 2))
    with np.errstate(over="ignore", invalid="ignore"):
        for name in sent:
            x, y = (record[name].numpy().astype(np.float64) for record in (sent, got))
            squares[int(name not in parameters)] += [((y - x) ** 2).sum(), (x**2).sum()]
    (moved, start), (others, others_start) = np.sqrt(squares)
    return moved, others, start, others_start


def _figures(found: np.ndarray, by_step: bool) -> tuple[float, ...]:
    moved, others, start, others_start, steps = found
    each = moved / np.maximum(steps, 1) * steps.mean()
    bounds = [(moved, start, 10.0), (others, others_start, 1000.0)]
    if by_step:
        bounds.append((each, start, 10.0))
    parts = [
        move.max() / max(factor * _median(move), 0.5 * scale[0], 1e-30)
        for move, scale, factor in bounds
    ]
    ratios = [values.max() / (_median(values) or 1.0) for values in (moved, each, others)]
    return (*ratios, (moved / start).max(), max(parts))


def _median(values: np.ndarray) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    main(sys.argv[1:])
