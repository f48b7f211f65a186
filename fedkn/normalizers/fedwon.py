"""FedWon: scaled weight standardization and adaptive gradient clipping, no normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedkn.normalizers.sws import ScaledWeightStandardizationNormalizer

__all__ = ["FedWonNormalizer"]


@dataclass(frozen=True)
class FedWonNormalizer(ScaledWeightStandardizationNormalizer):
    """FedWon: ``sws``, trained with adaptive gradient clipping.

    The layers are those of ``sws``. What is added is a rule of local training: the gradient of
    every unit is clipped to a part of its weights' norm (`AdaptiveClipping`, in
    fedkn/training/adaptive_clipping.py). The part is ``train.adaptive_clip``; as published it is
    0.16 here: the least that is advised for batches of 128 and 256 (MosaicML Composer's notes on
    AGC, which tell of ablations; the smaller the batches, the larger). FedWon's own is from 0.01 to
    1.28, by the batch size (a reader's notes; the paper's text was not at hand).

    Federation rule: weights, biases and the gain g of each output channel are shared.
    """

    name: ClassVar[str] = "fedwon"
    title: ClassVar[str] = "FedWon"
    paper: ClassVar[str] = "Zhuang & Lyu, ICLR 2024, arXiv 2306.05879; arXiv 2102.06171, Eq. 1, 3"
    not_for: ClassVar[str] = (
        "Rates that are not tuned for it, because what a step changes is bounded by rate times "
        "`train.adaptive_clip`; deep residual networks, whose branches are not scaled (nf's are); "
        "DP-SGD, under which it clips what is mostly noise."
    )
    adaptive_clip: ClassVar[float] = 0.16
