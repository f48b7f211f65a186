from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from fedkn.errors import UserError
from fedkn.layers import KNConv2d, dropout_stream, native
from tests.fedkn.layers.paths import path


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not looked for the kernels yet, with an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    native.load.cache_clear()
    yield monkeypatch
    native.load.cache_clear()


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


def test_switched_off_is_the_plain_path():
    layer, x = KNConv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    with native.switched_off():
        assert not native.serves(x, layer.weight, layer.bias)
    assert native.serves(x, layer.weight, layer.bias) == native.load()


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


def test_0_does_without(fresh) -> None:
    fresh.setenv("FEDKN_NATIVE", "0")
    assert not native.load()


def test_an_unknown_wish_is_named(fresh) -> None:
    fresh.setenv("FEDKN_NATIVE", "yes")
    with pytest.raises(UserError, match="FEDKN_NATIVE 'yes'"):
        native.load()


def test_without_a_compiler_auto_goes_on_and_1_fails(fresh) -> None:
    fresh.setenv("CXX", "/nowhere/c++")
    fresh.setenv("FEDKN_NATIVE", "auto")
    assert not native.load()
    native.load.cache_clear()
    fresh.setenv("FEDKN_NATIVE", "1")
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        native.load()


def test_a_failed_build_warns_once_under_auto_and_fails_under_1(fresh, tmp_path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    fresh.setenv("FEDKN_NATIVE", "auto")
    with pytest.warns(UserWarning, match="broken compiler"):
        assert not native.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native.load()
    native.load.cache_clear()
    fresh.setenv("FEDKN_NATIVE", "1")
    with pytest.raises(UserError, match="broken compiler"):
        native.load()
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_library_that_is_none_is_built_again(fresh, tmp_path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nfor last; do case "$before" in -o) echo x > "$last"; esac; '
                        'before="$last"; done\n')  # fmt: skip
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    loaded = []

    def bring_in(library) -> None:
        if not library.read_text():
            raise OSError("file too short")
        loaded.append(library)

    fresh.setattr(native, "_bring_in", bring_in)
    assert native.load()
    loaded[0].write_text("")
    native.load.cache_clear()
    assert native.load()
    assert loaded[1] == loaded[0]
    loaded[0].write_text("")
    native.load.cache_clear()
    fresh.setenv("CXX", "/nowhere/c++")
    with pytest.warns(UserWarning, match="file too short"):
        assert not native.load()


def test_processes_that_start_together_build_once(tmp_path) -> None:
    # A stand-in compiler that counts its calls and is slow enough for the others to wait.
    calls, compiler = tmp_path / "calls", tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\necho call >> {calls}\nsleep 0.5\nwhile [ "$1" != -o ]; do shift; done\n'
        'echo built > "$2"\n'
    )
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    program = "from fedkn.layers import native; print(native._library())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = {process.communicate(timeout=60)[0] for process in processes}
    assert len(answers) == 1
    assert next(iter(answers)).strip().endswith(".so")
    assert calls.read_text().split() == ["call"] * 2  # one compilation, one link
