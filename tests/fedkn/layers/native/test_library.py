from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from fedkn.errors import UserError
from fedkn.layers import KNConv2d
from fedkn.layers.native import library


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not looked for the kernels yet, with an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    library.load.cache_clear()
    yield monkeypatch
    library.load.cache_clear()


def test_switched_off_is_the_plain_path():
    layer, x = KNConv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    with library.switched_off():
        assert not library.serves(x, layer.weight, layer.bias)
    assert bool(library.serves(x, layer.weight, layer.bias)) == library.load()


def test_0_does_without(fresh) -> None:
    fresh.setenv("FEDKN_NATIVE", "0")
    assert not library.load()


def test_an_unknown_wish_is_named(fresh) -> None:
    fresh.setenv("FEDKN_NATIVE", "yes")
    with pytest.raises(UserError, match="FEDKN_NATIVE 'yes'"):
        library.load()


def test_without_a_compiler_auto_goes_on_and_1_fails(fresh) -> None:
    fresh.setenv("CXX", "/nowhere/c++")
    fresh.setenv("FEDKN_NATIVE", "auto")
    assert not library.load()
    library.load.cache_clear()
    fresh.setenv("FEDKN_NATIVE", "1")
    with pytest.raises(UserError, match="no C\\+\\+ compiler"):
        library.load()


def test_a_failed_build_warns_once_under_auto_and_fails_under_1(fresh, tmp_path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    fresh.setenv("FEDKN_NATIVE", "auto")
    with pytest.warns(UserWarning, match="broken compiler"):
        assert not library.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not library.load()
    library.load.cache_clear()
    fresh.setenv("FEDKN_NATIVE", "1")
    with pytest.raises(UserError, match="broken compiler"):
        library.load()
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

    fresh.setattr(library, "_bring_in", bring_in)
    assert library.load()
    loaded[0].write_text("")
    library.load.cache_clear()
    assert library.load()
    assert loaded[1] == loaded[0]
    loaded[0].write_text("")
    library.load.cache_clear()
    fresh.setenv("CXX", "/nowhere/c++")
    with pytest.warns(UserWarning, match="file too short"):
        assert not library.load()


@pytest.mark.parametrize("new", [True, False])
def test_strings_are_those_that_torch_was_built_with(new, fresh, tmp_path) -> None:
    compiler, told = tmp_path / "c++", tmp_path / "told"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {told}\nexit 1\n')
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    fresh.setattr(torch, "compiled_with_cxx11_abi", lambda: new)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert not library.load()
    assert ("-D_GLIBCXX_USE_CXX11_ABI=0" in told.read_text().split()) is not new


def test_processes_that_start_together_build_once(tmp_path) -> None:
    # A stand-in compiler that counts its calls and is slow enough for the others to wait.
    calls, compiler = tmp_path / "calls", tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\necho call >> {calls}\nsleep 0.5\nwhile [ "$1" != -o ]; do shift; done\n'
        'echo built > "$2"\n'
    )
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    program = "from fedkn.layers.native import library; print(library._library())"
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
