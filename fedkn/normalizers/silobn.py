"""SiloBN: batch normalization whose statistics stay on the client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedkn.normalizers.batch_family import BatchNormFamily
from fedkn.normalizers.rule import TensorRole

__all__ = ["SiloBNNormalizer"]


@dataclass(frozen=True)
class SiloBNNormalizer(BatchNormFamily):
    """SiloBN: gamma and beta are averaged, the running statistics (mu, sigma^2) stay local.

    The paper splits BatchNorm's four vectors: the learned (gamma, beta) are shared, the statistics
    are the client's own and never sent, which also keeps private what they tell of its data.

    Federation rule: shared, but local for both running statistics. The global model has those it
    was initialised with, so what it scores says little. The rule is that of ``batch`` with
    ``bn_statistics = local``.
    """

    name: ClassVar[str] = "silobn"
    title: ClassVar[str] = "SiloBN"
    paper: ClassVar[str] = "Andreux et al., DCL at MICCAI 2020, arXiv 2008.07424"
    statistics: ClassVar[str] = "the batch and all pixels, per channel"
    not_for: ClassVar[str] = (
        "A model for clients that never took part, which have no statistics before some are "
        "measured; batches of one image; few images a client: on its clients' images it is "
        "worse than fedbn in most columns of docs/early-training.md."
    )

    def _parameter_role(self, round: int) -> TensorRole:
        return TensorRole.SHARED

    def _statistic_role(self, tensor: str, round: int) -> TensorRole:
        return TensorRole.LOCAL
