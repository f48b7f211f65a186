"""Normalizers by name. To add one: a file with its class, and the class in the tuple below."""

from __future__ import annotations

from typing import Any

from fedkn.errors import UserError, unknown_name
from fedkn.normalizers.anfr import ANFRNormalizer
from fedkn.normalizers.base import Normalizer
from fedkn.normalizers.batch import BatchNormalizer
from fedkn.normalizers.bcn import BatchChannelNormalizer
from fedkn.normalizers.brn import BatchRenormalizer
from fedkn.normalizers.dyt import DynamicTanhNormalizer
from fedkn.normalizers.evonorm_s import EvoNormSNormalizer
from fedkn.normalizers.fbn import FBNNormalizer
from fedkn.normalizers.feature_norm import FeatureNormalizer
from fedkn.normalizers.fedbn import FedBNNormalizer
from fedkn.normalizers.fedwon import FedWonNormalizer
from fedkn.normalizers.fixbn import FixBNNormalizer
from fedkn.normalizers.frn import FilterResponseNormalizer
from fedkn.normalizers.ghost import GhostBatchNormalizer
from fedkn.normalizers.group import GroupNormalizer
from fedkn.normalizers.hbn import HBNNormalizer
from fedkn.normalizers.instance import InstanceNormalizer
from fedkn.normalizers.kernel import KernelNormalizer
from fedkn.normalizers.layer import LayerNormalizer
from fedkn.normalizers.lcn import LocalContextNormalizer
from fedkn.normalizers.nf import NormalizerFreeNormalizer
from fedkn.normalizers.none import NoNormalizer
from fedkn.normalizers.online import OnlineNormalizer
from fedkn.normalizers.rms import RMSNormalizer
from fedkn.normalizers.rule import FederationRule, Forward, TensorRole
from fedkn.normalizers.silobn import SiloBNNormalizer
from fedkn.normalizers.sws import ScaledWeightStandardizationNormalizer
from fedkn.normalizers.ws_group import WeightStandardizedGroupNormalizer

__all__ = [
    "FederationRule",
    "Forward",
    "Normalizer",
    "TensorRole",
    "create",
    "names",
    "options",
]

_CLASSES: dict[str, type[Normalizer]] = {
    cls.name: cls
    for cls in (
        NoNormalizer,
        BatchNormalizer,
        GroupNormalizer,
        LayerNormalizer,
        InstanceNormalizer,
        WeightStandardizedGroupNormalizer,
        KernelNormalizer,
        ScaledWeightStandardizationNormalizer,
        NormalizerFreeNormalizer,
        FedWonNormalizer,
        ANFRNormalizer,
        FilterResponseNormalizer,
        EvoNormSNormalizer,
        RMSNormalizer,
        LocalContextNormalizer,
        DynamicTanhNormalizer,
        BatchRenormalizer,
        GhostBatchNormalizer,
        BatchChannelNormalizer,
        OnlineNormalizer,
        FeatureNormalizer,
        FedBNNormalizer,
        SiloBNNormalizer,
        FixBNNormalizer,
        FBNNormalizer,
        HBNNormalizer,
    )
}


def create(name: str, **settings: Any) -> Normalizer:
    """Return the normalizer called `name`, configured by `settings` (its options by keyword).

    Raises UserError for an unknown name or option, naming the nearest, and for a bad value.
    """
    valid = options(name)
    for option in settings:
        if not valid:
            raise UserError(f"normalizer '{name}' has no options: drop '{option}'")
        if option not in valid:
            raise unknown_name(f"option of normalizer '{name}'", option, valid)
    return _CLASSES[name](**settings)


def names() -> tuple[str, ...]:
    """Return the names that `create` knows."""
    return tuple(_CLASSES)


def options(name: str) -> tuple[str, ...]:
    """Return the names of the options of the normalizer called `name`."""
    if name not in _CLASSES:
        raise unknown_name("normalizer", name, _CLASSES)
    return tuple(_CLASSES[name].options())
