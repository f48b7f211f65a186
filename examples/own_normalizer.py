"""A normalizer of your own: BatchNorm that also trains on a last batch of one image.

fedkn's `batch` skips such a batch, since what it would be normalized by says nothing of other
images; many programs train on it. Here clients hold 33 images, of which batches of 8 leave one.
"""

from dataclasses import dataclass
from typing import ClassVar

import fedkn
from fedkn.normalizers.batch import BatchNormalizer


@dataclass(frozen=True)
class TrainsOnOne(BatchNormalizer):
    """BatchNorm, its statistics averaged, whose smallest batch is one image."""

    name: ClassVar[str] = "trains_on_one"
    title: ClassVar[str] = "BatchNorm, batches of one too"
    minimum_batch: ClassVar[int] = 1


if __name__ == "__main__":
    result = fedkn.compare(
        normalizer=["batch", "own_normalizer:TrainsOnOne"],
        batch_size=8,
        seeds=1,
        learning_rate=0.05,
        source="digits",
        partition="iid",
        clients=4,
        cohort=2,
        rounds=2,
        model={"name": "resnet8", "width": 4},
        settings={"data.train_limit": 132, "data.validation_fraction": 0},
        progress=False,
    )
    print(result.cells[["normalizer", "value"]].to_string(index=False))
