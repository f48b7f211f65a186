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
from fedkn.normalizers.fixup import FixupNormalizer
from fedkn.normalizers.frn import FilterResponseNormalizer
from fedkn.normalizers.ghost import GhostBatchNormalizer
from fedkn.normalizers.group import GroupNormalizer
from fedkn.normalizers.hbn import HBNNormalizer
from fedkn.normalizers.instance import InstanceNormalizer
from fedkn.normalizers.kernel import KernelNormalizer
from fedkn.normalizers.layer import LayerNormalizer
from fedkn.normalizers.lcn import LocalContextNormalizer
from fedkn.normalizers.mabn import MovingAverageNormalizer
from fedkn.normalizers.nf import NormalizerFreeNormalizer
from fedkn.normalizers.none import NoNormalizer
from fedkn.normalizers.online import OnlineNormalizer
from fedkn.normalizers.proxy import ProxyNormalizer
from fedkn.normalizers.rms import RMSNormalizer
from fedkn.normalizers.rule import FederationRule, Forward, TensorRole
from fedkn.normalizers.silobn import SiloBNNormalizer
from fedkn.normalizers.sws import ScaledWeightStandardizationNormalizer
from fedkn.normalizers.ws_group import WeightStandardizedGroupNormalizer
from fedkn.normalizers.ws_kernel import WeightStandardizedKernelNormalizer
from fedkn.references import find
from fedkn.text import printable

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
        FilterResponseNormalizer,
        EvoNormSNormalizer,
        RMSNormalizer,
        LocalContextNormalizer,
        BatchRenormalizer,
        FeatureNormalizer,
        FedBNNormalizer,
        SiloBNNormalizer,
        FixBNNormalizer,
        FBNNormalizer,
        HBNNormalizer,
        NormalizerFreeNormalizer,
        FedWonNormalizer,
        ANFRNormalizer,
        WeightStandardizedKernelNormalizer,
        DynamicTanhNormalizer,
        ProxyNormalizer,
        GhostBatchNormalizer,
        BatchChannelNormalizer,
        OnlineNormalizer,
        MovingAverageNormalizer,
        FixupNormalizer,
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
    try:
        return _class(name)(**settings)
    except UserError:
        raise
    except Exception as error:
        if name in _CLASSES:
            raise
        raise UserError(
            f"normalizer '{name}' cannot be made ({type(error).__name__}: {printable(error, 200)})"
        ) from error


def names() -> tuple[str, ...]:
    """Return the names of fedkn's own, without those of somebody's own."""
    return tuple(_CLASSES)


def options(name: str) -> tuple[str, ...]:
    """Return the names of the options of the normalizer called `name`."""
    return tuple(_class(name).options())


def _class(name: str) -> type[Normalizer]:
    """Return the class of a normalizer: ours, by reference, or registered by a package."""
    found = find("normalizer", name, _CLASSES)
    if not isinstance(found, type) or not issubclass(found, Normalizer):
        raise UserError(
            f"normalizer '{printable(name, 120)}' is no class made from "
            "fedkn.normalizers.Normalizer (docs/normalizers.md#your-own)"
        )
    missing = [*_abstract(found), *(key for key in _DECLARED if not hasattr(found, key))]
    if missing:
        raise UserError(
            f"normalizer '{printable(name, 120)}' does not say its {', '.join(missing)}: give "
            f"class {found.__name__} these"
        )
    return found


def _abstract(found: type[Normalizer]) -> list[str]:
    return sorted(getattr(found, "__abstractmethods__", ()))


_DECLARED = ("name", "title", "affine")
"""What every normalizer says of itself; the rest is for the page of docs."""
