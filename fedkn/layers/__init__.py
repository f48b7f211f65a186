"""Layers: kernel-normalized ones, and the rivals PyTorch lacks."""

from fedkn.layers.batch_channel_norm import BatchChannelNorm2d
from fedkn.layers.batch_renorm import BatchRenorm2d
from fedkn.layers.channel_gain import ChannelGain
from fedkn.layers.dynamic_tanh import DynamicTanh2d
from fedkn.layers.evo_norm import EvoNormS0
from fedkn.layers.feature_norm import FeatureNorm
from fedkn.layers.federated_batch_norm import FederatedBatchNorm2d, HybridBatchNorm2d
from fedkn.layers.filter_response_norm import FilterResponseNorm2d
from fedkn.layers.fixup import Multiplier, Shift, ShiftedConv2d
from fedkn.layers.ghost_batch_norm import GhostBatchNorm2d
from fedkn.layers.kernel.dropout import dropout_stream
from fedkn.layers.kernel.explanation import explain
from fedkn.layers.kernel.layer import KernelNorm1d, KernelNorm2d, KNConv1d, KNConv2d
from fedkn.layers.kernel.standardized import WSKNConv2d
from fedkn.layers.layer_norm import LayerNorm2d
from fedkn.layers.local_context_norm import LocalContextNorm2d
from fedkn.layers.moments import Moments
from fedkn.layers.moving_average_norm import CentredConv2d, MovingAverageNorm2d
from fedkn.layers.online_norm import OnlineNorm2d
from fedkn.layers.proxy_norm import ProxyNorm2d
from fedkn.layers.rms_norm import RMSNorm2d
from fedkn.layers.scaled_ws_conv import Gain, ScaledWSConv2d
from fedkn.layers.skip_init import SkipInit
from fedkn.layers.squeeze_excite import SqueezeExcite2d
from fedkn.layers.ws_conv import WSConv2d

__all__ = [
    "BatchChannelNorm2d",
    "BatchRenorm2d",
    "CentredConv2d",
    "ChannelGain",
    "DynamicTanh2d",
    "EvoNormS0",
    "FeatureNorm",
    "FederatedBatchNorm2d",
    "FilterResponseNorm2d",
    "Gain",
    "GhostBatchNorm2d",
    "HybridBatchNorm2d",
    "KNConv1d",
    "KNConv2d",
    "KernelNorm1d",
    "KernelNorm2d",
    "LayerNorm2d",
    "LocalContextNorm2d",
    "Moments",
    "MovingAverageNorm2d",
    "Multiplier",
    "OnlineNorm2d",
    "ProxyNorm2d",
    "RMSNorm2d",
    "ScaledWSConv2d",
    "Shift",
    "ShiftedConv2d",
    "SkipInit",
    "SqueezeExcite2d",
    "WSConv2d",
    "WSKNConv2d",
    "dropout_stream",
    "explain",
]
