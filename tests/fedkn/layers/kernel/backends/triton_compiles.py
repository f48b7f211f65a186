"""Run by test_triton: every kernel compiles for devices that need not be there, and reads widely.

On an sm_80 and an sm_90 what `channel_sums` and `finish_gradients` become is looked at as well:
float32 alone, and an access to memory is as wide as a thread's can be.
"""

from __future__ import annotations

import itertools
import re

import triton
from packaging.version import Version
from triton.backends import compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedkn.layers import convolution_kernels as convolutions
from fedkn.layers import group_norm_kernels as norms
from fedkn.layers import standardization_kernels as standardization
from fedkn.layers.kernel import mask_kernel
from fedkn.layers.kernel.backends import triton_kernels as kernels

FLOAT = "*fp32"
TAPS = dict.fromkeys(("SH", "SW", "PH", "PW", "DH", "DW"), 1) | {"KH": 3, "KW": 3}
NUMBERS = ("eps", "first", "excess", "least")


def compile_(kernel, types, constants, *, capability=90, sixteens=(), ones=()) -> str:
    """Compile it and return its PTX; `sixteens` are multiples of 16, `ones` are 1."""
    signature, values, divisible = {}, {}, []
    constants = constants | dict.fromkeys(ones, 1)
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            values[name] = constants[name]
            continue
        signature[name] = types.get(name, "fp32" if name in NUMBERS else "i32")
        if name in sixteens or (sixteens and signature[name].startswith("*")):
            divisible.append(i)
    source = source_of(kernel, signature, values, divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


def source_of(kernel, signature, values, divisible) -> ASTSource:
    """Return the kernel with `values` of constants, and these places `divisible` by 16."""
    if Version(triton.__version__) < Version("3.3"):
        attributes = compiler.AttrsDescriptor.from_hints(dict.fromkeys(divisible, 16))
        return ASTSource(kernel, signature, values, attributes)
    names = kernel.arg_names
    whole = {name: signature.get(name, "constexpr") for name in names}
    places = {(names.index(name),): value for name, value in values.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i in divisible}
    return ASTSource(kernel, whole, constexprs=places, attrs=attributes)


def check_accesses(ptx: str, width: str) -> None:
    assert ".f64" not in ptx
    assert re.search(rf"ld\.global\S*\.v{width}", ptx), "no access of that width"


STRIDES = ("stride_k", "stride_n", "stride_c", "stride_p")
DSTRIDES = tuple("d" + name for name in STRIDES)
STATISTICS = {"sums": FLOAT, "mean": FLOAT, "scale": FLOAT, "maps": FLOAT, "parts": FLOAT}
MASKS = ((True, True), (True, False), (False, True))
for x, (masked, aligned), last in itertools.product((FLOAT, "*bf16"), MASKS, (True, False)):
    key = "*i64" if aligned else "i64"
    types = STATISTICS | dict.fromkeys(("x", "dx", "dw", "out", "db"), x) | {"key": key}
    block = {"BLOCK_C": 64, "BLOCK_Q": 8} if last else {"BLOCK_C": 8, "BLOCK_Q": 64}
    common = block | {"MASKED": masked, "POINTER": aligned, "ALIGNED": aligned, "SPLITS": 2}
    common |= {"QUADS": aligned and not last}
    wide = aligned or last
    ones = ("stride_c" if last else "stride_p",)
    sixteens = (*STRIDES, *DSTRIDES, "PIXELS", "C", "H", "W") if wide else ()
    known = {"sixteens": sixteens, "ones": ones}
    width = "2.b32" if x != FLOAT and not last else "4.b32"
    for capability in (80, 90) if aligned else (90,):
        ptx = compile_(kernels.channel_sums, types, common, capability=capability, **known)
        if wide:
            check_accesses(ptx, width)
    own = common | TAPS | {"SHARES": 2, "CENTRED": not masked, "BIAS": True, "WEIGHT": True}
    known["ones"] += ("d" + ones[0],)
    ptx = compile_(kernels.finish_gradients, types, own | {"TAPS": 9 if aligned else 1}, **known)
    if wide:
        check_accesses(ptx, width)
for x, (relu, output), centred in itertools.product(
    (FLOAT, "*bf16"), ((True, True), (False, True), (False, False)), (True, False)
):
    maps = STATISTICS | {"filters": FLOAT} | dict.fromkeys(("z", "y", "g", "output", "dz"), x)
    maps |= {"bias": x}
    common = {"CENTRED": centred, "BIAS": True, "RELU": relu, "BLOCK_O": 8, "BLOCK_P": 128}
    compile_(kernels.epilogue, maps, common | {"KEEP_Z": not output})
    compile_(kernels.reduce_gradient, maps, common | {"OUTPUT": output, "SPLITS": 2})
for (x, masked), taps in zip(
    itertools.product((FLOAT, "*bf16"), (True, False)), (1, 9, 9, 1), strict=True
):
    types = STATISTICS | {"filters": FLOAT, "weight": x, "used": x}
    own = {"MASKED": masked, "CENTRED": not masked, "COPY": not masked or taps > 1, "TAPS": taps}
    ptx = compile_(kernels.moments, types, TAPS | own | {"SPLITS": 2, "BLOCK": 128})
    assert ".f64" not in ptx
compile_(mask_kernel.draw_masks, {"keys": "*i64", "out": FLOAT}, {"BLOCK": 256})
for x, relu in itertools.product((FLOAT, "*bf16"), (True, False)):
    maps = dict.fromkeys(("x", "y", "g", "dx", "weight", "bias"), x) | STATISTICS
    common = {"RELU": relu, "BLOCK_C": 16, "BLOCK_P": 128}
    assert ".f64" not in compile_(norms.normalize, maps, common)
    assert ".f64" not in compile_(norms.normalize_back, maps, common)
    # What is 1 is a constant to Triton.
    for kernel in (norms.normalize, norms.normalize_back):
        compile_(kernel, maps, common, ones=("N", "EACH", "PIXELS"))
filters = dict.fromkeys(("weight", "gain", "used", "mean", "energy", "g", "dw", "dgain"), FLOAT)
for kernel, ones in itertools.product(
    (standardization.standardize, standardization.standardize_back), ((), ("WEIGHTS",))
):
    compile_(kernel, filters, {}, ones=ones)
for transposed in (True, False):
    maps = dict.fromkeys(("x", "w", "bias", "y", "g", "parts"), FLOAT)
    common = TAPS | {"BLOCK_O": 32, "BLOCK_C": 32, "BLOCK_M": 64}
    compile_(
        convolutions.gather_product,
        maps,
        common | {"TRANSPOSED": transposed, "BIAS": not transposed},
    )
    compile_(convolutions.weight_product, maps, common | {"SPLITS": 4})
