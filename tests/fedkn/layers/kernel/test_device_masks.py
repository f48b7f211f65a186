from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedkn.layers.kernel import device_masks, dropout
from fedkn.layers.kernel.dropout import keep_mask
from tests.fedkn.layers.kernel.backends.test_triton import needs_triton, run


@needs_triton
def test_masks_are_the_cpus_in_the_interpreter() -> None:
    run(str(Path(__file__).parent / "masks_agree.py"), TRITON_INTERPRET="1")


@pytest.mark.parametrize("per_sample", [12, 10])
def test_each_client_of_a_vmap_gets_its_own(monkeypatch, per_sample: int) -> None:
    cpu = torch.device("cpu")
    shape = torch.Size((3, per_sample))

    def masks(key):
        return keep_mask(key, shape, 20000, torch.float32, cpu)

    keys = torch.tensor([5, -6, 7])
    wanted = torch.stack([masks(int(key)) for key in keys])

    def drawn(keys, words, level, dtype):
        pieces = [keep_mask(int(k), torch.Size((1, 4 * words)), level, dtype, cpu) for k in keys]
        return torch.cat(pieces)

    monkeypatch.setattr(device_masks, "drawn", drawn)
    monkeypatch.setattr(
        dropout.device_masks, "serves", lambda key, device: isinstance(key, torch.Tensor)
    )
    assert torch.equal(torch.func.vmap(masks)(keys), wanted)
    assert torch.equal(masks(keys[1]), wanted[1])
