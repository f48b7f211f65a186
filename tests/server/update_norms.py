"""``python -m tests.server.update_norms``: how far honest updates lie apart, as docs/strategies.md has it.

For every experiment below, over all its rounds: the largest of the norms of a round's updates over
their median (the lower of the middle two), of parameters, of parameters by local step, and of the
other tensors that travel; and the largest move of the parameters over the norm of what was sent.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from flwr.app import Message

from fedkn.errors import FedknError
from fedkn.federation import ARRAYS, METRICS
from server.global_model import GlobalModel
from server.run import run_server
from tests.server.fake_grid import FakeGrid, small

COMMON = {
    "partition.clients": 20,
    "cohort": 8,
    "rounds": 12,
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
    "converged": {"rounds": 60, "partition.alpha": 0.1, "train.learning_rate": 0.2},
    "DP-SGD": {"privacy.mechanism": "example", "train.batch_size": 8},
}


def main(chosen: list[str]) -> None:
    logging.disable(logging.CRITICAL)
    print(
        f"{'':24} {'params':>8} {'by step':>8} {'others':>8} {'move':>8} {'others':>8}", flush=True
    )
    for name, changes in CASES.items():
        if chosen and name not in chosen:
            continue
        figures = [f"{value:8.2f}" for value in measured(changes)]
        print(f"{name:24} {' '.join(figures)}", flush=True)


def measured(changes: dict[str, object]) -> tuple[float, ...]:
    config = small(**{key.replace(".", "__"): v for key, v in {**COMMON, **changes}.items()})
    parameters = set(GlobalModel(config).parameters)
    rounds: dict[int, list[tuple[float, ...]]] = defaultdict(list)

    def note(round_: int, partition: int, message: Message, reply: Message) -> Iterable[Message]:
        if reply.has_content():
            sent, got = (m.content.array_records[ARRAYS] for m in (message, reply))
            metrics = reply.content.metric_records[METRICS]
            rounds[round_].append((*moves(sent, got, parameters), metrics["steps"]))
        return [reply]

    try:
        run_server(FakeGrid(config, note), config)
    except FedknError as error:
        print("  ", str(error)[:150])
    return tuple(
        max(np.array(values) for values in column)
        for column in zip(*(ratios(found) for found in rounds.values()), strict=True)
    )


def moves(sent, got, parameters: set[str]) -> tuple[float, float, float, float]:
    """Return the norms of the moves of parameters and of others, and those over what was sent."""
    squares = np.zeros((2, 2))
    with np.errstate(over="ignore", invalid="ignore"):
        for name in sent:
            x, y = (record[name].numpy().astype(np.float64) for record in (sent, got))
            squares[int(name not in parameters)] += [((y - x) ** 2).sum(), (x**2).sum()]
    (p, px), (o, ox) = np.sqrt(squares)
    return p, o, p / px, o / ox if ox else 0.0


def ratios(found: list[tuple[float, ...]]) -> tuple[float, ...]:
    p, o, relative, others, steps = np.array(found).T
    each = [_over_median(p), _over_median(p / np.maximum(steps, 1)), _over_median(o)]
    return (*each, relative.max(), others.max())


def _over_median(values: np.ndarray) -> float:
    finite = np.sort(values[np.isfinite(values)])
    if not len(finite) or not finite[(len(finite) - 1) // 2]:
        return 0.0
    return float(finite[-1] / finite[(len(finite) - 1) // 2])


if __name__ == "__main__":
    main(sys.argv[1:])
