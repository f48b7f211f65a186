import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedkn.data.sources import load
from fedkn.errors import UserError

_rng = np.random.default_rng(0)
_IMAGES = _rng.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
_LABELS = np.arange(20) % 4


def _saved(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "data.npz"
    np.savez(path, allow_pickle=True, **arrays)
    return path


@pytest.mark.parametrize(
    "images",
    [
        _IMAGES,
        np.moveaxis(_IMAGES, 3, 1),
        np.asfortranarray(_IMAGES),
        _IMAGES.astype(np.float32) / 255,
        _IMAGES.astype(np.float64) / 255,
    ],
    ids=["NHWC", "NCHW", "fortran", "float32", "float64"],
)
def test_layouts_and_types_give_the_same_images(images: np.ndarray, tmp_path: Path) -> None:
    path = _saved(
        tmp_path,
        images=images,
        labels=_LABELS.astype(np.uint8),
        test_images=_IMAGES[:4],
        test_labels=_LABELS[:4],
    )
    source = load("arrays", path)
    assert source.train.images.is_contiguous()
    assert np.array_equal(source.train.images.permute(0, 2, 3, 1).numpy(), _IMAGES)
    assert source.train.labels.tolist() == _LABELS.tolist()
    assert source.train.classes == ("0", "1", "2", "3")
    assert len(source.test) == 4


def test_grey_images_without_a_test_set(tmp_path: Path) -> None:
    path = _saved(tmp_path, images=_IMAGES[..., 0], labels=_LABELS)
    source = load("arrays", path)
    assert source.train.images.shape == (16, 1, 6, 5)
    assert source.test.images.shape == (4, 1, 6, 5)
    assert sorted(source.test.labels.tolist()) == [0, 1, 2, 3]
    again = load("arrays", path)
    assert again.test.images.equal(source.test.images)


def test_names_of_classes(tmp_path: Path) -> None:
    names = np.array(["a", "b", "c", "d", "e"])
    source = load("arrays", _saved(tmp_path, images=_IMAGES, labels=_LABELS, classes=names))
    assert source.train.classes == ("a", "b", "c", "d", "e")


def _with_nan() -> np.ndarray:
    images = _IMAGES.astype(np.float32) / 255
    images[3, 2, 1, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": _LABELS}, "no array 'images'"),
        ({"images": _IMAGES}, "no array 'labels'"),
        ({"images": _IMAGES, "labels": _LABELS[:-1]}, "20 images but 19 labels"),
        ({"images": _IMAGES, "labels": _LABELS, "test_images": _IMAGES}, "'test_labels'"),
        ({"images": _IMAGES.astype(np.int32), "labels": _LABELS}, "uint8.*int32"),
        ({"images": _with_nan(), "labels": _LABELS}, "NaN"),
        ({"images": _IMAGES.astype(np.float32), "labels": _LABELS}, "divide by 255"),
        ({"images": -(_IMAGES / 255.0), "labels": _LABELS}, r"\[0, 1\]"),
        ({"images": _IMAGES[0], "labels": _LABELS}, "6 images but 20 labels"),
        ({"images": _IMAGES[:, 0, 0], "labels": _LABELS}, r"\(N, H, W\)"),
        ({"images": _IMAGES[:, :3], "labels": _LABELS}, "ambiguous"),
        ({"images": _IMAGES, "labels": _LABELS / 1.0}, "integers"),
        ({"images": _IMAGES, "labels": _LABELS - 1}, r"'labels' holds -1 \(first at index 0\)"),
        ({"images": _IMAGES, "labels": _LABELS * 0}, "one class"),
        ({"images": _IMAGES[:0], "labels": _LABELS[:0]}, "no training images|one class"),
        ({"images": _IMAGES, "labels": _LABELS, "classes": np.arange(4)}, "array of text"),
        ({"images": _IMAGES, "labels": _LABELS, "classes": np.array(["a", "b"])}, r"0\.\.1"),
        ({"images": _IMAGES.astype(object), "labels": _LABELS}, "not an intact"),
    ],
)
def test_unfit_arrays_are_named(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    path = _saved(tmp_path, **arrays)
    with pytest.raises(UserError, match=message) as caught:
        load("arrays", path)
    assert "\n" not in str(caught.value)


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 3
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [_cut, _flipped, lambda _: b"", lambda _: b"not a zip file"],
    ids=["cut", "flipped", "empty", "text"],
)
def test_damaged_file(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = _saved(tmp_path, images=_IMAGES, labels=_LABELS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="not an intact"):
        load("arrays", path)


def test_header_that_claims_absurd_sizes(tmp_path: Path) -> None:
    path = _saved(tmp_path, images=_IMAGES, labels=_LABELS)
    with zipfile.ZipFile(path, "w") as archive, archive.open("images.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**15, 28, 28)}
        np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(UserError, match="no array 'labels'"):
        load("arrays", path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]  # a payload

    path = _saved(tmp_path, images=np.array([Trap()], dtype=object), labels=_LABELS)
    with pytest.raises(UserError, match="pickle"):
        load("arrays", path)
    assert not (tmp_path / "sprung").exists()


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .npz file at .*data\.root"):
        load("arrays", tmp_path / "nothing.npz")


def test_a_lone_npy_is_not_an_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", _IMAGES)
    with pytest.raises(UserError, match="not an intact"):
        load("arrays", tmp_path / "images.npy")
