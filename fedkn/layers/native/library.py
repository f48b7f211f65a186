"""The library of fused CPU kernels: built once by the machine's compiler, and optional.

FEDKN_NATIVE=auto (the default) uses them where an earlier build or a C++ compiler is found, 0
never, 1 always, so that a failure to build is an error. The plain path gives the same numbers to
1e-5. The library lies in TORCH_EXTENSIONS_DIR (else the user's cache), under a name that holds
the hash of its sources and of what it was built against; processes that start together wait for
one build instead of racing for it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fedkn.errors import UserError, unknown_name
from fedkn.layers.circumstances import No, Served
from fedkn.layers.native.sources import MAIN, sources

__all__ = [
    "compiler",
    "load",
    "recording",
    "serves",
    "switched_off",
    "takes",
    "used",
    "wished",
]

_on = True
_recording = False


@contextmanager
def switched_off() -> Iterator[None]:
    """Do without the kernels inside the block, in this process: to compare both ways."""
    global _on  # noqa: PLW0603 - a switch of the process
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


def used() -> bool:
    """Whether the library is loaded, or can be, and is not `switched_off`."""
    return _on and load()


@contextmanager
def recording() -> Iterator[None]:
    """Serve inside the block though a dispatch mode looks on: one that is to see the kernels."""
    global _recording  # noqa: PLW0603 - a switch of the process
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> Served:
    """Whether the kernels are wanted, can be had, and take these tensors.

    They take float32 tensors on the CPU, contiguous or channels last. The first call with such
    tensors builds the library if no earlier build is found.
    """
    if _on and not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return _STRIDED
    return takes(x, weight, bias)


def takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Served:
    """Do what `serves` does, whatever the layout in memory."""
    if not _on:
        return _OFF
    if not (_fits(x) and _fits(weight) and (bias is None or _fits(bias))):
        return _MISFIT
    # Whoever counts or records operations should see the convolution.
    if torch._C._len_torch_dispatch_stack() and not _recording:
        return _WATCHED
    return True if load() else _NONE


@functools.cache
def load() -> bool:
    """Load the kernels, building them if need be, and say whether they can be used.

    Raises UserError if FEDKN_NATIVE is none of auto, 0 and 1, or if it is 1 and they cannot.
    """
    wish = wished()
    if wish == "0":
        return False
    try:
        library = _library()
        if library is None:
            reason = "no C++ compiler was found: install one, such as g++, or set CXX"
            if wish == "1":
                raise UserError(f"FEDKN_NATIVE=1, but {reason}")
            return False
        _bring_in_or_mend(library)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        message = f"the fused CPU kernels cannot be used: {str(detail).strip()[-2000:]}"
        if wish == "1":
            raise UserError(f"FEDKN_NATIVE=1, but {message}") from error
        warnings.warn(
            f"{message}\nfedkn goes on without them (FEDKN_NATIVE=0 silences this)", stacklevel=2
        )
        return False
    return True


def wished() -> str:
    """Return FEDKN_NATIVE: auto, 0 or 1. Raises UserError if it is something else."""
    wish = os.environ.get("FEDKN_NATIVE", "auto")
    if wish not in _WISHES:
        raise unknown_name("FEDKN_NATIVE", wish, _WISHES)
    return wish


def compiler() -> list[str] | None:
    """Return the command that builds the kernels: CXX, else the first that is found, or None."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        return command if shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return None if found is None else [found]


_OFF = No("the fused CPU kernels are switched off in this process")
_STRIDED = No("the maps are neither contiguous nor channels last in memory")
_MISFIT = No("it takes plain float32 tensors on the CPU")
_WATCHED = No("a dispatch mode looks on, and should see the convolution")
_NONE = No("the fused CPU kernels cannot be had: FEDKN_NATIVE=0, or none built and no C++ compiler")

_TENSORS = (Tensor, torch.nn.Parameter)
_WISHES = ("auto", "0", "1")
# Without the latter two a loop with a square root or a choice is not vectorized.
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")


def _fits(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32 and type(tensor) in _TENSORS


@functools.cache
def _bring_in(library: Path) -> None:
    torch.ops.load_library(library)  # type: ignore[no-untyped-call] # torch's


def _bring_in_or_mend(library: Path) -> None:
    try:
        _bring_in(library)
    except OSError:
        if compiler() is None:
            raise
        # What is there is no library, as after a full disk: build it once more, in its place.
        library.unlink()
        _library()
        _bring_in(library)


def _library() -> Path | None:
    """The built library; None where there is neither an earlier build nor a compiler."""
    command = compiler()
    flags = [*_FLAGS, *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]
    if not torch.compiled_with_cxx11_abi():  # as the package index's torch 2.6 for Linux is not
        flags.append("-D_GLIBCXX_USE_CXX11_ABI=0")
    texts = [part for named in sources().items() for part in named]
    built_from = [*texts, torch.__version__, platform.machine(), *flags]
    digest = hashlib.blake2b("\0".join(built_from).encode(), digest_size=8).hexdigest()
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or _cache() / "fedkn")
    library = folder / f"fedkn_native_{digest}.so"
    if library.exists():
        return library
    if command is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        # The lock goes with its process, however that ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            print(  # noqa: T201 - said once per machine, before half a minute of silence
                f"fedkn: building its CPU kernels, once, about 20 s: {library} "
                "(FEDKN_NATIVE=0 does without)",
                file=sys.stderr,
                flush=True,
            )
            _build(command, flags, library)
    return library


def _build(command: list[str], flags: list[str], library: Path) -> None:
    root = Path(torch.__file__).parent
    include, lib = root / "include", root / "lib"
    # Linked to torch's own OpenMP runtime, the kernels share its threads and their number.
    openmp = [] if "clang" in command[0] else [str(path) for path in lib.glob("libgomp.so*")]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        compiled, unfinished = Path(folder) / "native.o", Path(folder) / library.name
        for name, text in sources().items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        headers = ("-isystem", include, "-isystem", include / "torch" / "csrc" / "api" / "include")
        threads = ("-fopenmp",) if openmp else ()
        compile_ = (*command, *flags, *threads, *headers, "-c", Path(folder) / MAIN, "-o", compiled)
        unresolved = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
        link = (
            *command, "-shared", compiled, "-o", unfinished,
            f"-L{lib}", "-ltorch_cpu", "-lc10", *openmp, *unresolved,
        )  # fmt: skip
        for step in (compile_, link):
            subprocess.run(list(map(str, step)), check=True, capture_output=True, text=True)
        with unfinished.open("rb") as file:
            # Else a power cut could leave a library without its end, which ends who loads it.
            os.fsync(file.fileno())
        unfinished.replace(library)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
