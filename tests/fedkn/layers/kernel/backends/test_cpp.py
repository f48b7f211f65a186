"""The fused CPU kernels against the plain path, in either layout."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fedkn.layers import KNConv2d, dropout_stream
from tests.fedkn.layers.paths import path


@pytest.mark.parametrize("shape", [(2, 16, 65, 65), (3, 40, 4, 4), (2, 130, 7, 7), (1, 3, 90, 33)])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("keeps_output", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_agree_with_the_plain_path_on_large_and_odd_maps(
    shape, activation, keeps_output, training, layout
):
    torch.manual_seed(0)
    layer = KNConv2d(
        shape[1], 8, 3, padding=1, activation=activation, keeps_output=keeps_output
    ).train(training)
    torch.nn.init.normal_(layer.bias)
    layer.to(memory_format=layout)
    x, results = (torch.randn(shape) + 0.3).contiguous(memory_format=layout), []
    for name in ("plain", "native"):
        with path(name), dropout_stream(3):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            assert y.is_contiguous(memory_format=layout)
            gradients = torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
        results.append((y, *gradients))
    for plain, fused in zip(*results, strict=True):
        assert ((plain - fused).abs().max() / plain.abs().max()).item() < 1e-5


@pytest.mark.parametrize("shape", [(2, 5, 6, 6), (3, 12, 3, 5), (1, 1, 4, 4), (2, 7, 1, 1)])
@pytest.mark.parametrize("groups", [1, "all"])
def test_the_layout_in_memory_does_not_change_the_numbers(shape, groups):
    """The same masks whatever the layout: four pixels of a channel share a word, or do not."""
    torch.manual_seed(1)
    channels = shape[1]
    layer = KNConv2d(channels, 2 * channels, 2, padding=1, stride=2, dropout_p=0.4)
    if groups == "all":
        layer = KNConv2d(channels, 2 * channels, 2, padding=1, groups=channels, dropout_p=0.4)
    x, outputs = torch.randn(shape), []
    for layout in (torch.contiguous_format, torch.channels_last):
        with path("native"), dropout_stream(9):
            outputs.append(layer.to(memory_format=layout)(x.contiguous(memory_format=layout)))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_change_the_gradient_of_a_sample(threads):
    before = torch.get_num_threads()
    layer, x = KNConv2d(8, 8, 3), torch.randn(5, 8, 9, 9)
    try:
        with path("native"):
            torch.set_num_threads(1)
            with dropout_stream(1):
                alone = layer(x)
            torch.set_num_threads(threads)
            with dropout_stream(1):
                torch.testing.assert_close(layer(x), alone, rtol=1e-6, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_without_the_library_exporters_find_nothing_undeclared():
    program = "import torch, fedkn.layers; torch.export.default_decompositions()"
    subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"FEDKN_NATIVE": "0"}, check=True
    )
