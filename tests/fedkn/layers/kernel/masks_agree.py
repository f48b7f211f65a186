"""Run by test_device_masks under TRITON_INTERPRET=1: the kernel's masks against the CPU's."""

from __future__ import annotations

import torch

from fedkn.layers.kernel.device_masks import drawn
from fedkn.layers.kernel.dropout import keep_mask
from tests.fedkn.layers import interpreter  # noqa: F401

for words, level in ((1, 3277), (5, 65000), (256, 1), (700, 30000)):
    keys = torch.tensor([0, -1, 2**62 + 5, -(2**63)])
    lanes = drawn(keys, words, level, torch.float32)
    for own, key in zip(lanes, keys, strict=True):
        shape = torch.Size((1, 4 * words))
        wanted = keep_mask(int(key), shape, level, torch.float32, torch.device("cpu"))
        assert torch.equal(own, wanted[0]), (words, level, int(key))
assert drawn(keys, 0, 9, torch.float32).shape == (4, 0)
