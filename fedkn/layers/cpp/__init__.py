"""The C++ source of the fused CPU kernels.

The kernel-normalized convolution (plan, contiguous, channels_last, operators): what plain.py does
in a dozen passes over the map is two passes forward and three backward here, around PyTorch's own
convolution. The equations and their names are those of plain.py; the dropout generator is that of
dropout.py, bit for bit. Then what the rivals' small networks spend their time on: GroupNorm with
ReLU and pooling, max-pooling, and the convolution of images.

float32, contiguous or channels last; sums that cancel are taken in double. The code is in Python
modules because Flower bundles .py files alone: a node must have what a checkout has.
"""

from fedkn.layers.cpp import (
    channels_last,
    contiguous,
    first_convolution,
    group_norm,
    group_norm_contiguous,
    group_norm_pool,
    max_pool,
    operators,
    plan,
)

__all__ = ["SOURCE"]

SOURCE = "\n".join(
    (
        plan.CODE,
        contiguous.CODE,
        channels_last.CODE,
        operators.CODE,
        max_pool.CODE,
        group_norm.CODE,
        group_norm_pool.CODE,
        group_norm_contiguous.CODE,
        first_convolution.CODE,
    )
)
