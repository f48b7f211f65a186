from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed, nn

from fedkn.layers import KernelNorm2d, KNConv2d, dropout_stream


@pytest.fixture
def one_process(tmp_path):
    if not distributed.is_available():
        pytest.skip("this build of PyTorch has no torch.distributed")
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel_gives_the_gradients_of_the_module_itself(one_process) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        KNConv2d(3, 6, 3, padding=1, activation="relu"), KNConv2d(6, 4, 2), KernelNorm2d(1)
    )
    alone = copy.deepcopy(model)
    x = torch.randn(2, 3, 7, 7)
    parallel = nn.parallel.DistributedDataParallel(model)
    for network in (parallel, alone):
        with dropout_stream(4):
            network(x).square().sum().backward()
    for shared, own in zip(model.parameters(), alone.parameters(), strict=True):
        assert own.grad is not None
        torch.testing.assert_close(shared.grad, own.grad)
