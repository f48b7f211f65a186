"""Run by test_triton under TRITON_INTERPRET=1: the kernels against the plain path."""

from __future__ import annotations

import itertools

import torch

from fedkn.layers.kernel.backends import plain, triton
from fedkn.layers.kernel.settings import Geometry, Settings
from tests.fedkn.layers import interpreter  # noqa: F401

CASES = (
    ((2, 6, 8, 8), (3, 3), ((1, 1), (1, 1), (1, 1), 1), 77, 3277),
    ((3, 6, 7, 5), (2, 3), ((2, 1), (1, 2), (1, 2), 2), -99, 3277),
    ((3, 9, 7, 5), (3, 3), ((1, 1), (1, 1), (1, 1), 1), None, 0),
    ((2, 40, 4, 5), (1, 1), ((2, 2), (0, 0), (1, 1), 1), None, 3277),
    ((1, 3, 1, 6), (1, 1), ((1, 1), (0, 0), (1, 1), 1), torch.tensor(2**62 + 5), 30000),
)

torch.manual_seed(0)
for (shape, kernel, place, key, level), (relu, output), layout, offset in itertools.product(
    CASES,
    ((False, False), (True, False), (False, True)),
    (torch.contiguous_format, torch.channels_last),
    (0.0, 1000.0),
):
    if offset and (relu or output):
        continue
    x = (torch.randn(shape) + offset).contiguous(memory_format=layout)
    weight = torch.randn(6, shape[1] // place[3], *kernel)
    bias = torch.randn(6) if relu or output else None
    geometry = Geometry(kernel, *place)
    n = geometry.unit_size(shape[1])
    settings = Settings(geometry, n, key, level, 1e-5, relu, output)
    tensors = (x, weight, bias)
    wanted = (True, True, bias is not None)
    outputs = []
    for path in (plain, triton):
        y, saved = path.forward(*tensors, settings, keep=True)
        g = torch.ones_like(y) * torch.arange(6.0).view(1, -1, 1, 1)
        outputs.append([y, *path.backward(g, tensors, saved, settings, wanted)])
        assert torch.equal(path.forward(*tensors, settings, keep=False)[0], y)
    for one, other in zip(*outputs, strict=True):
        if one is None:
            assert not wanted[2]
            continue
        error = ((one - other).norm() / one.norm().clamp_min(1e-6)).item()
        # |x| is only known to 6e-5 deviations where the mean is a thousand.
        assert error < (1e-5 if offset == 0 or shape[1] == 1 else 2e-3), (
            shape,
            relu,
            layout,
            error,
        )
