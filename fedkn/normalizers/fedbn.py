"""FedBN: batch normalization that never leaves the client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedkn.normalizers.batch_family import BatchNormFamily
from fedkn.normalizers.rule import TensorRole

__all__ = ["FedBNNormalizer"]


@dataclass(frozen=True)
class FedBNNormalizer(BatchNormFamily):
    """FedBN: everything is averaged but BatchNorm, all of which stays on the client.

    Wherever a layer is BatchNorm, each client keeps its own gamma, beta and running statistics:
    ``w_k <- w_k`` there, ``w_k <- mean over clients`` elsewhere. It is meant for clients that
    differ in features, each evaluated on its own data. Layers are BatchNorm by their type here;
    going by "bn" in the name, as the authors' code does, misses some in most networks.

    Federation rule: local, all but the integer batch counter, which is not averaged anywhere. The
    global model keeps gamma, beta and statistics as initialised, so what it scores says little.
    """

    name: ClassVar[str] = "fedbn"
    title: ClassVar[str] = "FedBN"
    paper: ClassVar[str] = "Li et al., ICLR 2021, arXiv 2102.07623"
    statistics: ClassVar[str] = "the batch and all pixels, per channel"
    not_for: ClassVar[str] = (
        "A model for clients that never took part, because its norms stay where they were "
        "trained; batches of one image; few images a client, dealt evenly: such clients are no "
        "better off with it (docs/early-training.md)."
    )

    def _parameter_role(self, round: int) -> TensorRole:
        return TensorRole.LOCAL

    def _statistic_role(self, tensor: str, round: int) -> TensorRole:
        return TensorRole.LOCAL
