"""Train on data of your own, each client with what is naturally its own.

Here: signals of two sensors, such that each of six devices has an offset and a habit of its own. A
source returns arrays or tensors of any number type and shape; ``clients`` says whose each is.
"""

import numpy as np
from torch import nn

import fedkn


def signals(devices: int = 6, length: int = 64) -> dict[str, object]:
    """Return waves (N, 2, length), float32: class 0 is slow, 1 is fast, 2 is a burst."""
    rng = np.random.default_rng(7)
    time = np.linspace(0, 1, length)
    inputs, targets, clients = [], [], []
    for device in range(devices):
        offset, favourite = rng.normal(scale=0.5), device % 3
        for _ in range(40):
            kind = favourite if rng.random() < 0.6 else int(rng.integers(3))
            phase = rng.random()
            wave = {
                0: np.sin(2 * np.pi * (2 * time + phase)),
                1: np.sin(2 * np.pi * (9 * time + phase)),
                2: np.exp(-200 * (time - phase) ** 2),
            }[kind]
            clean = np.stack([wave + offset, 0.5 * wave])
            inputs.append(clean + rng.normal(scale=0.2, size=clean.shape))
            targets.append(kind)
            clients.append(f"device {device}")
    return {
        "inputs": np.array(inputs, np.float32),
        "targets": np.array(targets),
        "clients": clients,
        "classes": ["slow", "fast", "burst"],
    }


def network(num_classes: int) -> nn.Module:
    """Return a network for signals; it has no norms, and so nothing to convert."""
    return nn.Sequential(
        nn.Conv1d(2, 8, 9, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(4),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


if __name__ == "__main__":
    result = fedkn.run(
        source="own_data:signals",
        model="own_data:network",
        normalizer="none",
        partition="natural",
        clients=6,
        cohort=3,
        rounds=4,
        batch_size=4,
        learning_rate=0.1,
    )
    print(result.rounds[["round", "metric", "value"]].to_string(index=False))
