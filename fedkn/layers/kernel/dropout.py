"""Dropout masks that are a pure function of (seed, call, element).

The generator is counter based: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014, with Stafford's variant 13 of the finaliser). One 64-bit word
gives four 16-bit lanes, so n/4 words serve n elements. The mask of a call is the same bits on the
CPU, on CUDA, under `torch.func.vmap` and in the native kernels, and nothing needs to be stored:
the backward pass can draw it again from its key.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fedkn.errors import UserError
from fedkn.layers.kernel import device_masks, host_masks
from fedkn.layers.kernel.dtypes import cast, wide
from fedkn.layers.kernel.host_masks import LEVELS
from fedkn.layers.kernel.settings import Settings

__all__ = [
    "LEVELS",
    "Stream",
    "draw_key",
    "draw_mask",
    "drop_level",
    "dropout_keys",
    "dropout_stream",
    "keep_mask",
    "keep_mask_and_bits",
    "key_number",
    "keys_of",
    "mask_of_bits",
    "next_key",
    "next_number",
]


class Stream:
    """Where the dropout calls of a block take their keys from: a seed, or `keys` already drawn.

    Attributes:
        calls: how many keys have been taken.
    """

    def __init__(self, seed: int | Tensor, keys: Tensor | None = None) -> None:
        self.keys = keys
        self.calls = 0
        self._number = seed if isinstance(seed, int) else None
        # A tensor from the start: made within a compiled function it would be a constant of it.
        self._seed = torch.tensor(seed) if isinstance(seed, int) else seed
        self._captured = not self.on_host and _capturing()
        self._ahead: _Ahead | None = None

    @property
    def on_host(self) -> bool:
        """Whether keys can be read without waiting for a device."""
        return self._seed.device.type == "cpu"

    def key(self, device: torch.device, eager: bool = False) -> Tensor:
        """Take the next key, an int64 tensor without dimensions on `device`.

        On a GPU the keys of many calls are computed at once where tensors are `eager`: of one key
        it is a dozen launches.
        """
        self.calls += 1
        if self.keys is not None:
            return self.keys[self.calls - 1].to(device)
        seed = self._seed.to(device)
        when = self._when(seed) if eager else None
        if when is None:
            return _key(seed, self.calls)
        ahead = self._ahead
        if ahead is None or ahead.when != when or self.calls >= ahead.first + len(ahead.keys):
            ahead = self._ahead = _Ahead(when, self.calls, _keys(seed, self.calls, _AT_ONCE))
        return ahead.keys[self.calls - ahead.first]

    def number(self) -> int:
        """Take the next key as a Python int."""
        self.calls += 1
        if self.keys is not None:
            return int(self.keys[self.calls - 1])
        if self._number is None:
            self._number = int(self._seed)
        return key_number(self._number, self.calls)

    def _when(self, seed: Tensor) -> tuple[int, ...] | None:
        """Return what holds as long as keys computed ahead do, None where that cannot be told.

        A seed that changes in place has other keys. What one CUDA stream computes another would
        have to wait for; what is computed outside of a graph is gone when it is replayed, and what
        is within it does not come outside.
        """
        stream = _stream_of(seed.device)
        if (
            stream is None
            or seed.is_inference()  # then it has no version
            or self._captured != _capturing()
            or torch._C._len_torch_dispatch_stack()  # keys would be what such a mode makes of them
        ):
            return None
        return stream, seed._version


@contextmanager
def dropout_stream(seed: int | Tensor) -> Iterator[Stream]:
    """Seed every dropout inside the block: the i-th call draws the mask of (seed, i).

    `seed` is an int (see `fedkn.seeds.derive`) or an integer tensor without dimensions: a tensor
    lets `torch.func.vmap` give each client its own seed and spares `torch.compile` a recompile
    per step. Streams nest; the innermost one serves. Outside any stream each call draws its seed
    from torch's default generator, so `torch.manual_seed` does what it always does.

    Raises UserError if the seed is not an integer.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise UserError(f"a dropout seed must be int64, not {seed.dtype}")
        stream = Stream(seed)
    elif isinstance(seed, int):
        stream = Stream(_signed(seed))
    else:
        raise UserError(f"a dropout seed must be an int or an int64 tensor, not {seed!r}")
    with _active_stream(stream):
        yield stream


@contextmanager
def dropout_keys(keys: Tensor) -> Iterator[Stream]:
    """Give the i-th dropout call inside the block ``keys[i - 1]``, which `keys_of` has drawn.

    Where keys are drawn beforehand for many blocks, nothing is computed for them within one.
    `keys` is (calls,), int64.
    """
    with _active_stream(Stream(keys, keys)) as stream:
        yield stream


def keys_of(seeds: Tensor, calls: int) -> Tensor:
    """Return the keys of the first `calls` calls of the streams of `seeds`.

    `seeds` (...), int64; the result is (..., calls), int64.
    """
    return _keys(seeds, 1, calls)


def key_number(seed: int, call: int) -> int:
    """Return the key of call number `call`, from 1, of the `dropout_stream` of an int `seed`."""
    word = 2**64 - 1
    z = (seed + call * _GAMMA) & word
    z = ((z ^ (z >> 33)) * _KEY_MIX[0]) & word
    z = ((z ^ (z >> 33)) * _KEY_MIX[1]) & word
    return _signed(z ^ (z >> 33))


def drop_level(p: float) -> int:
    """Return the drop probability `p` in units of 1/LEVELS.

    Raises UserError unless 0 <= p < 1 (to the nearest level).
    """
    level = round(p * LEVELS) if 0.0 <= p < 1.0 else LEVELS
    if level >= LEVELS:
        raise UserError(f"dropout_p is {p}: give a probability from 0 to below 1, such as 0.05")
    return level


def next_key(device: torch.device, eager: bool = False) -> Tensor:
    """Return the key of the next dropout call, an int64 tensor without dimensions.

    `eager` as in `Stream.key`.
    """
    stream = _active.stream
    if stream is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    return stream.key(device, eager)


def next_number() -> int:
    """Return the key of the next dropout call as a Python int (the same key as `next_key`'s)."""
    stream = _active.stream
    if stream is None:
        return int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
    return stream.number()


def draw_key(device: torch.device, eager: bool) -> int | Tensor:
    """Return the key of the next dropout call, of masks on `device`.

    An int where tensors are `eager` (`fedkn.layers.circumstances`) and to read it is no wait for a
    device.
    """
    if eager and (device.type == "cpu" or _seeded_on_host()):
        return next_number()
    return next_key(device, eager)


def draw_mask(x: Tensor, settings: Settings) -> Tensor | None:
    """Return the mask of zeros and ones of `settings` for `x`, in the statistics' dtype."""
    if settings.key is None:
        return None
    return keep_mask(settings.key, x.shape, settings.level, wide(x.dtype), x.device)


def keep_mask(
    key: int | Tensor, shape: torch.Size, level: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return a mask of zeros and ones of the given `shape`, (N, ...), dtype and device.

    Every element is zero with probability level/LEVELS. Each sample starts a new word, so a mask
    depends on the shape of a sample and the position in the batch alone.
    """
    if torch.compiler.is_compiling() and isinstance(key, Tensor):
        mask: Tensor = _opaque_mask(key, shape, level, dtype)
        return mask
    words = _words(shape)
    if isinstance(key, int) and device.type == "cpu":
        keep = cast(host_masks.draw_lanes(key, words, level), dtype)
    elif device_masks.serves(key, device):
        keep = device_masks.draw_lanes(key, words, level, dtype, device)
    else:
        counter = torch.arange(1, words + 1, dtype=torch.int64, device=device)
        # Not in place: under vmap the key has a batch dimension that the counter lacks.
        lanes = _lanes(_finalise(counter.mul_(_GAMMA) + key))
        # lane >= threshold, in int16 and converted once: several times faster than through bool.
        threshold = level - LEVELS // 2
        keep = lanes.clamp(threshold - 1, threshold).sub_(threshold - 1).to(dtype)
    return _shaped(keep, shape)


def keep_mask_and_bits(
    key: int, shape: torch.Size, level: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return `keep_mask` on the CPU, and the same in bits for `mask_of_bits`."""
    keep, bits = host_masks.draw_lanes_and_bits(key, _words(shape), level)
    return _shaped(cast(keep, dtype), shape), bits


def mask_of_bits(bits: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the mask that `keep_mask_and_bits` returned with `bits`, for the same `shape`."""
    return _shaped(cast(host_masks.unpack_lanes(bits, _words(shape)), dtype), shape)


def _seeded_on_host() -> bool:
    """Whether a stream is active whose seed can be read without waiting for a device."""
    stream = _active.stream
    return stream is not None and stream.on_host


def _words(shape: torch.Size) -> int:
    return shape[0] * -(-shape[1:].numel() // 4)


def _shaped(lanes: Tensor, shape: torch.Size) -> Tensor:
    per_sample = shape[1:].numel()
    if per_sample % 4 == 0:
        return lanes.view(shape)
    return lanes.view(shape[0], -(-per_sample // 4) * 4)[:, :per_sample].reshape(shape)


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GAMMA = _signed(host_masks.GAMMA)
_MIX = (_signed(host_masks.MIX[0]), _signed(host_masks.MIX[1]))
# Keys are mixed by another finaliser (MurmurHash3's) than words, so that no key's sequence of
# words is a piece of another's.
_KEY_MIX = (_signed(0xFF51AFD7ED558CCD), _signed(0xC4CEB9FE1A85EC53))


_AT_ONCE = 64  # more than most networks ask for in a step


class _Ahead(NamedTuple):
    """The keys of the calls from `first` on."""

    when: tuple[int, ...]
    first: int
    keys: Tensor


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    if torch.compiler.is_compiling():
        return False
    ready = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch annotates it so
    return ready and torch.cuda.is_current_stream_capturing()


def _stream_of(device: torch.device) -> int | None:
    """Return a number of the CUDA stream of `device` that work goes to, None on other devices."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


class _Active(threading.local):
    stream: Stream | None = None


_active = _Active()


@contextmanager
def _active_stream(stream: Stream) -> Iterator[Stream]:
    outer = _active.stream
    _active.stream = stream
    try:
        yield stream
    finally:
        _active.stream = outer


def _shifted(z: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically: the mask makes it the logical shift that SplitMix64 wants.
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _finalise(z: Tensor) -> Tensor:
    z.bitwise_xor_(_shifted(z, 30)).mul_(_MIX[0])
    z.bitwise_xor_(_shifted(z, 27)).mul_(_MIX[1])
    return z.bitwise_xor_(_shifted(z, 31))


def _lanes(words: Tensor) -> Tensor:
    """Return the four lanes of each word, lowest first, as int16: (n,) to (4n,)."""
    if _VIEWS:
        return words.view(torch.int16)
    # A cast wraps, so each lane is its lowest 16 bits.
    parts = (words, words >> 16, words >> 32, words >> 48)
    return torch.stack([part.to(torch.int16) for part in parts], -1).flatten(-2)


# Before 2.13 torch.func.vmap has no rule for a view of another dtype, several times as fast.
_VIEWS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def _key(seed: Tensor, call: int) -> Tensor:
    return _mixed(seed + _signed(call * _GAMMA))


def _keys(seeds: Tensor, first: int, calls: int) -> Tensor:
    numbers = torch.arange(first, first + calls, dtype=torch.int64, device=seeds.device)
    return _mixed(seeds.unsqueeze(-1) + numbers.mul_(_GAMMA))


def _mixed(z: Tensor) -> Tensor:
    z.bitwise_xor_(_shifted(z, 33)).mul_(_KEY_MIX[0])
    z.bitwise_xor_(_shifted(z, 33)).mul_(_KEY_MIX[1])
    return z.bitwise_xor_(_shifted(z, 33))


# Compilers must not see inside: Inductor (torch 2.13) overflows on the counter's arithmetic and
# writes past the end of a view to a narrower dtype.
@torch.library.custom_op("fedkn::keep_mask", mutates_args=())
def _opaque_mask(key: Tensor, shape: Sequence[int], level: int, dtype: torch.dtype) -> Tensor:
    return keep_mask(key, torch.Size(shape), level, dtype, key.device).contiguous()


@_opaque_mask.register_fake
def _(key: Tensor, shape: Sequence[int], level: int, dtype: torch.dtype) -> Tensor:
    return key.new_empty(shape, dtype=dtype)
