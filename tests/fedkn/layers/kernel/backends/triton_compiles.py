"""Run by test_triton: every kernel compiles for an sm_90 device, which need not be there."""

from __future__ import annotations

import itertools

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedkn.layers import convolution_kernels as convolutions
from fedkn.layers.kernel.backends import triton_kernels as kernels

FLOAT, DOUBLE = "*fp32", "*fp64"
TAPS = dict.fromkeys(("SH", "SW", "PH", "PW", "DH", "DW"), 1) | {"KH": 3, "KW": 3}


def compile_(kernel, types, constants) -> None:
    signature, values = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name, "fp32" if name == "eps" else "i32")
    source = ASTSource(kernel, signature, constexprs=values)
    triton.compile(source, target=GPUTarget("cuda", 90, 32))


for x, (masked, aligned), tile in itertools.product(
    (FLOAT, "*bf16"), ((True, True), (True, False), (False, True)), ((8, 128), (32, 32))
):
    blocks = {"BLOCK_C": tile[0], "BLOCK_P": tile[1], "POINTER": aligned, "ALIGNED": aligned}
    key = "*i64" if aligned else "i64"
    common = blocks | {"MASKED": masked, "SPLITS": 2}
    compile_(kernels.channel_sums, {"x": x, "key": key, "sums": DOUBLE}, common)
    compile_(
        kernels.add_through_statistics,
        {"x": x, "dx": x, "key": key} | dict.fromkeys(("mean", "scale", "maps"), FLOAT),
        common | TAPS | {"SHARES": 2},
    )
for x, (relu, output), centred in itertools.product(
    (FLOAT, "*bf16"), ((True, True), (False, True), (False, False)), (True, False)
):
    maps = dict.fromkeys(("mean", "scale", "filters", "maps", "filter_sums"), FLOAT)
    common = {"CENTRED": centred, "BIAS": True, "RELU": relu, "BLOCK_O": 8, "BLOCK_P": 128}
    compile_(kernels.epilogue, maps | {"z": x, "y": x, "bias": x}, common | {"KEEP_Z": not output})
    compile_(
        kernels.reduce_gradient,
        maps | {"g": x, "output": x, "dz": x, "bias": x},
        common | {"OUTPUT": output, "SPLITS": 2},
    )
for masked in (True, False):
    compile_(
        kernels.moments,
        {"sums": DOUBLE, "mean": FLOAT, "scale": FLOAT},
        TAPS | {"MASKED": masked, "SPLITS": 2, "BLOCK_P": 128},
    )
for transposed in (True, False):
    maps = dict.fromkeys(("x", "w", "bias", "y", "g", "parts"), FLOAT)
    common = TAPS | {"BLOCK_O": 32, "BLOCK_C": 32, "BLOCK_M": 64}
    compile_(
        convolutions.gather_product,
        maps,
        common | {"TRANSPOSED": transposed, "BIAS": not transposed},
    )
    compile_(convolutions.weight_product, maps, common | {"SPLITS": 4})
