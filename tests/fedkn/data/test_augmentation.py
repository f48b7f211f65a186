from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.data.augmentation import (
    SCALINGS,
    augment,
    channel_statistics,
    check_augmentation,
    scale,
)
from fedkn.data.examples import Examples
from fedkn.errors import UserError


def _naive(
    images: np.ndarray, flipped: list[bool], corners: list[tuple[int, int]], p: int
) -> np.ndarray:
    out = np.zeros_like(images)
    height, width = images.shape[2:]
    for n, image in enumerate(images):
        for i in range(height):
            for j in range(width):
                row, column = i + corners[n][0] - p, j + corners[n][1] - p
                inside = 0 <= row < height and 0 <= column < width
                target = width - 1 - j if flipped[n] else j
                out[n, :, i, target] = image[:, row, column] if inside else 0
    return out


@given(
    st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 1000),
    st.sampled_from([torch.uint8, torch.float32]),
)
@settings(deadline=None, max_examples=150)
def test_against_a_loop_over_pixels(
    shape: tuple[int, ...], flip: bool, padding: int, seed: int, dtype: torch.dtype
) -> None:
    images = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    result = augment(images, torch.Generator().manual_seed(seed), flip=flip, crop_padding=padding)
    draws, count = torch.Generator().manual_seed(seed), shape[0]
    flipped = [False] * count
    if flip:
        flipped = (torch.rand(count, 1, generator=draws) < 0.5).flatten().tolist()
    corners = [(0, 0)] * count
    if padding:
        top, left = torch.randint(2 * padding + 1, (2, count), generator=draws).tolist()
        corners = list(zip(top, left, strict=True))
    assert result.dtype == dtype
    assert np.array_equal(result.numpy(), _naive(images.numpy(), flipped, corners, padding))


def test_all_offsets_and_both_flips_are_equally_frequent() -> None:
    images = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 1] = 1
    seen = augment(images, torch.Generator().manual_seed(0), flip=True, crop_padding=1)
    frequency = seen.double().mean(0)[0]
    # Column 1 moves to 0..2 and its mirror image to 2..4; rows 1..3; 18 equally likely outcomes.
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[1:4] = torch.tensor([1, 1, 2, 1, 1], dtype=torch.float64) / 18
    assert torch.allclose(frequency, expected, atol=0.012)


def test_nothing_asked_nothing_done() -> None:
    images = torch.ones(2, 1, 3, 3, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert augment(images, generator) is images
    assert torch.equal(generator.get_state(), before)


def test_input_and_global_state_stay_as_they_are() -> None:
    images = torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8)
    copy, state = images.clone(), torch.get_rng_state()
    augment(images, torch.Generator(), flip=True, crop_padding=2)
    assert torch.equal(images, copy)
    assert torch.equal(torch.get_rng_state(), state)


def test_negative_padding_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.crop_padding"):
        augment(torch.zeros(1, 1, 2, 2), torch.Generator(), crop_padding=-1)


def test_scalings_against_float64() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 2, 1, 1)
    mean, std = torch.tensor([0.3, 0.5]), torch.tensor([0.2, 0.1])
    exact = values.double() / 255
    expected = {
        "unit": exact,
        "centered": exact * 2 - 1,
        "standardized": (exact - mean.double().view(2, 1, 1)) / std.double().view(2, 1, 1),
        "none": values.double(),
    }
    for scaling in SCALINGS:
        result = scale(values, scaling, mean, std)
        assert result.dtype == torch.float32
        assert torch.allclose(result.double(), expected[scaling], atol=2e-6)
    assert values.dtype == torch.uint8
    assert int(values.max()) == 255


def test_scaling_errors() -> None:
    images = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(UserError, match="did you mean 'standardized'"):
        scale(images, "standardised")
    with pytest.raises(UserError, match="mean and std"):
        scale(images, "standardized")


@pytest.mark.parametrize("count", [1, 7, 5000])
def test_channel_statistics_against_numpy(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(256, (count, 3, 4, 5), generator=generator).to(torch.uint8)
    images[:, 1] //= 3
    labels = torch.zeros(count, dtype=torch.int64)
    mean, std = channel_statistics(Examples(images, labels, ("a", "b")))
    exact = images.numpy().astype(np.float64) / 255
    assert mean.numpy() == pytest.approx(exact.mean(axis=(0, 2, 3)), rel=1e-7)
    assert std.numpy() == pytest.approx(exact.std(axis=(0, 2, 3)), rel=1e-7)


def test_constant_channel_standardizes_to_zero() -> None:
    images = torch.full((3, 1, 2, 2), 51, dtype=torch.uint8)
    data = Examples(images, torch.zeros(3, dtype=torch.int64), ("a", "b"))
    mean, std = channel_statistics(data)
    assert std.tolist() == [1.0]
    assert scale(images, "standardized", mean, std).abs().max() < 1e-7


def test_statistics_of_nothing() -> None:
    images = torch.zeros(0, 1, 2, 2, dtype=torch.uint8)
    data = Examples(images, torch.zeros(0, dtype=torch.int64), ("a", "b"))
    with pytest.raises(UserError, match="no examples"):
        channel_statistics(data)


def _plain(inputs: torch.Tensor) -> Examples:
    return Examples(inputs, torch.zeros(len(inputs)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("shape", [(3,), (3, 50), (3, 7, 5), (3, 2, 3, 4)])
def test_statistics_of_other_types_are_exact_however_large_the_mean(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(211, *shape, generator=generator, dtype=torch.float64) * 100
    # A mean of a thousand or ten million times the deviation costs no digits.
    inputs[:, 1] += 2e3 if dtype == torch.float16 else 1e9
    inputs = inputs.to(dtype)
    mean, std = channel_statistics(_plain(inputs))
    assert mean.dtype == std.dtype == torch.float64
    for channel in range(3):
        exact = [Fraction(value) for value in inputs[:, channel].double().flatten().tolist()]
        expected = sum(exact) / len(exact)
        variance = sum((value - expected) ** 2 for value in exact) / len(exact)
        assert float(mean[channel]) == pytest.approx(float(expected), rel=1e-15)
        assert float(std[channel]) == pytest.approx(float(variance) ** 0.5, rel=1e-12)
    before = inputs.clone()
    scaled = scale(inputs, "standardized", mean, std)
    assert torch.equal(inputs, before)
    assert scaled.dtype == torch.float32
    shape_ = (1, 3, *(1,) * (len(shape) - 1))
    naive = (inputs.double() - mean.view(shape_)) / std.view(shape_)
    assert torch.equal(scaled, naive.float())


def test_statistics_of_several_chunks_and_of_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.arange(600.0).view(100, 2, 3)
    inputs[:, 1] = 0.1
    whole = channel_statistics(_plain(inputs))
    monkeypatch.setattr("fedkn.data.augmentation._NUMBERS", 30)
    parts = channel_statistics(_plain(inputs))
    assert torch.allclose(parts[0], whole[0], rtol=1e-15)
    assert torch.allclose(parts[1], whole[1], rtol=1e-15)
    assert whole[0][1] == inputs[0, 1, 0].double()
    assert whole[1][1] == 1
    assert scale(inputs, "standardized", *whole)[:, 1].abs().max() == 0


@pytest.mark.parametrize("values", [[1e200, -1e200], [1.7e308, 1.7e308, -1.7e308]])
def test_numbers_too_large_to_be_standardized_are_refused(values: list[float]) -> None:
    inputs = torch.tensor(values, dtype=torch.float64)[:, None]
    with pytest.raises(UserError, match=r"channel 0 .* too large.*data\.scaling = 'none'"):
        channel_statistics(_plain(inputs))


@pytest.mark.parametrize("scaling", ["unit", "centered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int8])
def test_scalings_of_a_byte_are_for_bytes(scaling: str, dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=r"is for uint8.*data\.scaling = 'standardized'"):
        scale(torch.ones(2, 3).to(dtype), scaling)


@pytest.mark.parametrize(
    ("dtype", "after"),
    [
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
        (torch.uint8, torch.float32),
        (torch.int16, torch.float32),
        (torch.int64, torch.int64),
    ],
)
def test_as_they_are(dtype: torch.dtype, after: torch.dtype) -> None:
    inputs = torch.arange(6).view(2, 3).to(dtype)
    scaled = scale(inputs, "none")
    assert torch.equal(scaled, inputs.to(after))
    assert scaled.dtype == after
    scaled.zero_()
    assert inputs.any()


def test_only_images_are_augmented() -> None:
    images, series = _plain(torch.zeros(2, 1, 4, 4)), _plain(torch.zeros(2, 1, 4))
    check_augmentation(images, flip=True, crop_padding=1)
    check_augmentation(series, flip=False, crop_padding=0)
    for settings_ in ({"flip": True, "crop_padding": 0}, {"flip": False, "crop_padding": 1}):
        with pytest.raises(UserError, match=r"for images .*these inputs are 1x4"):
            check_augmentation(series, **settings_)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_result_on_cuda() -> None:
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    data = Examples(images, torch.zeros(5, dtype=torch.int64), ("a", "b"))
    mean, std = channel_statistics(data)
    there = channel_statistics(data.to("cuda"))
    assert torch.equal(there[0], mean)
    assert torch.equal(there[1], std)

    def result(batch: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        drawn = augment(batch, generator, flip=True, crop_padding=2)
        return scale(drawn, "standardized", mean, std)

    assert torch.allclose(result(images.cuda()).cpu(), result(images), atol=1e-6)
