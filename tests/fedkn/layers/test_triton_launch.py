"""Launches are held to those that Triton makes, without a GPU: by a driver that only notes them."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from fedkn.layers import triton_launch
from fedkn.layers.triton_launch import launch

triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

pytestmark = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5),
    reason="Triton before 3.5 launches by itself",
)


@triton.jit(do_not_specialize=["key"])
def scaled(x, key, y, COUNT, scale, BLOCK: tl.constexpr, MASKED: tl.constexpr):  # noqa: PLR0917
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, place < COUNT) * scale + (key if MASKED else 0)
    tl.store(y + place, value, place < COUNT)


@triton.jit
def copied(x, y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


class Driver:
    """Of GPUs of which `current` is the current one."""

    current = 0

    def get_current_device(self):
        return self.current

    def get_current_stream(self, device):
        return 100 + device

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Compiled(CompiledKernel):
    """A kernel for a GPU that notes its launches."""

    def __init__(self, key, launches):
        self.key, self.launches = key, launches
        self.module = self._module_pid = self.function = self.packed_metadata = None

    def _init_handles(self):
        pass

    def launch_metadata(self, *_):
        return None

    @property
    def run(self):
        def run(x, y, z, stream, *others):  # function, metadata twice, two hooks, arguments
            self.launches.append((self, (x, y, z), stream, others[5:]))

        return run


@contextmanager
def gpus():
    """GPUs for Triton and fedkn: what was launched, and how often Triton looked at arguments."""
    state = SimpleNamespace(driver=Driver(), launches=[], examined=0, on=0)

    def compile_(function, key, signature, device, *_):
        kernel = Compiled(key, state.launches)
        function.device_caches[device][0][key] = kernel
        return kernel

    run = JITFunction.run

    def counted(*arguments, **settings):
        state.examined += 1
        return run(*arguments, **settings)

    @contextmanager
    def entered(device):
        before, state.driver.current = state.driver.current, device
        yield
        state.driver.current = before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", compile_)
        patch.setattr(JITFunction, "run", counted)
        patch.setattr(triton_launch, "_known", {})
        patch.setattr(triton_launch, "_gpu_of", lambda _: state.on)
        patch.setattr(torch.cuda, "current_device", lambda: state.driver.current)
        patch.setattr(torch.cuda, "device", entered)
        drivers = triton.runtime.driver
        before = drivers._active
        drivers.set_active(state.driver)
        for kernel in (scaled, copied):
            kernel.device_caches.clear()
        try:
            yield state
        finally:
            drivers.set_active(before)
            for kernel in (scaled, copied):
                kernel.device_caches.clear()


def tensor(dtype=torch.float32, offset=0):
    return torch.zeros(80, dtype=dtype)[offset:]


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KEYS = (0, 1, 16, -1, -(2**31), -(2**31) - 1, 2**31 - 1, 2**31, -(2**63), 2**63 - 1)
VALUES = {
    "x": [tensor(dtype, offset) for dtype in DTYPES for offset in (0, 1, 8)],
    "key": [*KEYS, torch.zeros((), dtype=torch.int64)],
    "y": [tensor(dtype, offset) for dtype in DTYPES for offset in (0, 1, 8)],
    "COUNT": [0, 1, 2, 16, 17, 48, 2**31 - 1, 2**31, 2**31 + 16, True, 1.0],
    "scale": [0.5, 1.0, 2.0, 1, 2],
    "MASKED": [True, False],
    "BLOCK": [64, 128],
}


@pytest.mark.parametrize("name", VALUES)
def test_a_launch_is_the_one_that_triton_makes_whatever_was_launched_before(name):
    for pair in itertools.permutations(VALUES[name], 2):
        with gpus() as state:
            for value in (*pair, *pair):
                given = {which: values[0] for which, values in VALUES.items()} | {name: value}
                arguments = [given.pop(which) for which in ("x", "key", "y", "COUNT", "scale")]
                scaled[3, 2](*arguments, **given)
                launch(scaled, (3, 2), *arguments, **given)
                theirs, ours = state.launches[-2:]
                assert ours[:3] == theirs[:3]
                for a, b in zip(ours[3], theirs[3], strict=True):
                    assert a is b if isinstance(a, torch.Tensor) else (type(a), a) == (type(b), b)


def test_triton_examines_the_first_of_launches_alike():
    with gpus() as state:
        for key in KEYS:
            for _ in range(5):
                launch(scaled, (4,), tensor(), key, tensor(), 48, 0.5, BLOCK=64, MASKED=True)
        assert state.examined == 2  # keys of 32 bits and of 64
        assert len(state.launches) == 50
        assert {launched[1] for launched in state.launches} == {(4, 1, 1)}
        for _ in range(3):
            launch(copied, (1,), tensor(), tensor(), BLOCK=64)
        assert state.examined == 3


def test_launches_go_to_the_device_of_the_tensors():
    with gpus() as state:
        for device in (1, 0, 1, 1):
            state.on = device
            launch(copied, (1,), tensor(), tensor(), BLOCK=64)
            assert state.launches[-1][2] == 100 + device
            assert state.driver.current == 0
        assert state.examined == 2
        assert state.launches[0][0] is not state.launches[1][0]


def test_few_launches_are_remembered(monkeypatch):
    with gpus() as state:
        monkeypatch.setattr(triton_launch, "_MOST", 3)
        for count in range(20, 30):
            launch(scaled, (1,), tensor(), 0, tensor(), count, 0.5, BLOCK=64, MASKED=True)
            assert len(triton_launch._known) <= 3
        assert len(state.launches) == 10


def test_where_triton_leaves_constants_out_it_launches(monkeypatch):
    monkeypatch.setattr(triton_launch, "_compiled_kind", lambda: None)
    with gpus() as state:
        for _ in range(3):
            launch(copied, (1,), tensor(), tensor(), BLOCK=64)
        assert state.examined == len(state.launches) == 3


@pytest.mark.parametrize(("version", "hip"), [("3.2.0", None), ("3.4.0", None), ("3.6.0", "6.4")])
def test_which_launches_go_by_triton(monkeypatch, version, hip):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    triton_launch._compiled_kind.cache_clear()
    assert triton_launch._compiled_kind() is None
    monkeypatch.undo()
    triton_launch._compiled_kind.cache_clear()
    assert triton_launch._compiled_kind() is CompiledKernel


def test_the_gpu_is_that_of_the_first_tensor():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        on_second = torch.empty(2, device="cuda:1")
    assert triton_launch._gpu_of((3, on_second, torch.empty(2))) == 1
    assert triton_launch._gpu_of((0.5, torch.empty(2))) is None
    assert triton_launch._gpu_of((1,)) is None
