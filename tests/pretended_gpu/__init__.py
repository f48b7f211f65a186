"""A GPU that is not there: CPU tensors that behave as if they lay on one.

`pretended_gpu()` is the context. See `device.py` for tensors and `streams.py` for streams, graphs
and the order of what they do.
"""

from tests.pretended_gpu.device import Gpu, pretended_gpu

__all__ = ["Gpu", "pretended_gpu"]
