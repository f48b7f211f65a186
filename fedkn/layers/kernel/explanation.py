"""Why a backend computes a layer."""

from __future__ import annotations

from torch import Tensor

from fedkn.errors import UserError
from fedkn.layers import circumstances
from fedkn.layers.kernel import dispatch
from fedkn.layers.kernel.layer import KNConv

__all__ = ["explain"]


def explain(x: Tensor, layer: KNConv) -> str:
    """Say which backend would compute ``layer(x)`` here and now, and why each earlier one not.

    Here and now: under the transform, the compiler or the autocast that `explain` is called under.
    The layer is not run and no random number is drawn, but the fused kernels may be built.

    Returns a line for the backend, then one for each that was asked before it. Raises UserError if
    `layer` is no KNConv, and what the layer itself raises for `x`.
    """
    if not isinstance(layer, KNConv):
        raise UserError(f"explain takes a KNConv1d or KNConv2d, not {type(layer).__name__}")
    padded, geometry = layer.placed(x)
    settings = layer.settings(geometry, lambda: 0)
    answers = dispatch.answers(padded, layer.filters(), layer.bias, settings, circumstances.eager())
    served = next((name for name, answer in answers.items() if answer), "definition")
    refused = [f"  not {name}: {answer}" for name, answer in answers.items() if not answer]
    return "\n".join([served, *refused])
