"""The ways to compute a kernel-normalized convolution; `fedkn.layers.kernel.dispatch` chooses.

``plain``            gradients by hand in torch operations, on any device
``cpp``              the fused CPU kernels
``triton``           the fused CUDA kernels (``triton_kernels``)
``vmap``             ``cpp`` for the clients of one vmap, side by side
``opacus``           gradients of each example, for Opacus
"""
