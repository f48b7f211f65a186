"""FixBN: batch normalization whose statistics are frozen in the course of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkn.errors import UserError
from fedkn.normalizers.batch_family import BatchNormFamily
from fedkn.normalizers.rule import TensorRole

__all__ = ["FixBNNormalizer"]


@dataclass(frozen=True)
class FixBNNormalizer(BatchNormFamily):
    """FixBN: BatchNorm, then BatchNorm in evaluation mode on the global statistics.

    Before round `frozen_from` (the paper's first stage) it is BatchNorm under federated averaging.
    From then on, clients normalize by the running statistics (mu, sigma^2) that the server held:
    ``y = (x - mu) / sqrt(sigma^2 + eps) * gamma + beta``, in training as in evaluation, so that
    all clients' gradients are those of the same function. gamma and beta are trained throughout.

    The paper switches halfway (an experiment does so unless `frozen_from` is set) and keeps the
    momentum of SGD from round to round, which is ``train.keep_momentum`` here.

    Option: `frozen_from`, the first round on frozen statistics; 0 for none.

    Federation rule: averaged, parameters and statistics; the statistics frozen from that round on.
    A batch of one is skipped in every round, so that the same images count in both stages.
    """

    name: ClassVar[str] = "fixbn"
    title: ClassVar[str] = "FixBN"
    paper: ClassVar[str] = "Zhong, Chen & Chao, 2023, arXiv 2303.06530"
    statistics: ClassVar[str] = (
        "the batch and all pixels, per channel; later the global running ones"
    )
    not_for: ClassVar[str] = (
        "Short runs, in which statistics are frozen before the weights have settled: in most "
        "columns of docs/early-training.md it is below batch; batches of one image; DP-SGD, which "
        "needs gradients of single examples."
    )

    rule_settings: ClassVar[tuple[Mapping[str, Any], ...]] = ({"frozen_from": 2},)

    frozen_from: int = 0

    def __post_init__(self) -> None:
        if type(self.frozen_from) is not int or self.frozen_from < 0:
            raise UserError(
                f"frozen_from = {self.frozen_from!r} of normalizer 'fixbn' must be a round: "
                "a whole number, 1 or more, or 0 for none"
            )

    @property
    def label(self) -> str:
        """Title and when the statistics are frozen."""
        when = f"frozen from round {self.frozen_from}" if self.frozen_from else "never frozen"
        return f"{self.title} ({when})"

    def begin_training(self, model: nn.Module, round: int) -> None:
        """Let the norms use their running statistics, and leave them as they are, once frozen."""
        if self._frozen(round):
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _parameter_role(self, round: int) -> TensorRole:
        return TensorRole.SHARED

    def _statistic_role(self, tensor: str, round: int) -> TensorRole:
        return TensorRole.FROZEN if self._frozen(round) else TensorRole.SHARED

    def _frozen(self, round: int) -> bool:
        return 0 < self.frozen_from <= round
