import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    ],
    ids=["NHWC", "NCHW", "fortran"],
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
    assert source.train.inputs.is_contiguous()
    assert np.array_equal(source.train.inputs.permute(0, 2, 3, 1).numpy(), _IMAGES)
    assert source.train.targets.tolist() == _LABELS.tolist()
    assert source.train.classes == ("0", "1", "2", "3")
    assert len(source.test) == 4


def test_grey_images_without_a_test_set(tmp_path: Path) -> None:
    path = _saved(tmp_path, images=_IMAGES[..., 0], labels=_LABELS)
    source = load("arrays", path)
    assert source.train.inputs.shape == (16, 1, 6, 5)
    assert source.test.inputs.shape == (4, 1, 6, 5)
    assert sorted(source.test.targets.tolist()) == [0, 1, 2, 3]
    again = load("arrays", path)
    assert again.test.inputs.equal(source.test.inputs)


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
        ({"images": _IMAGES, "labels": _LABELS[:-1]}, "20 inputs but 19 targets"),
        ({"images": _IMAGES, "labels": _LABELS, "test_images": _IMAGES}, "'test_labels'"),
        ({"images": _IMAGES > 9, "labels": _LABELS}, "got bool: store it as float32"),
        ({"images": _with_nan(), "labels": _LABELS}, r"'images' holds nan at index \(3, 0, 2, 1\)"),
        ({"images": _IMAGES[0], "labels": _LABELS}, "6 inputs but 20 targets"),
        ({"images": _IMAGES[:, 0, 0], "labels": _LABELS}, r"\(N, H, W\)"),
        ({"images": _IMAGES[:, :3], "labels": _LABELS}, "ambiguous"),
        ({"images": _IMAGES, "labels": _LABELS / 1.0}, "integers"),
        ({"images": _IMAGES, "labels": _LABELS - 1}, r"'labels' holds -1 \(first at index 0\)"),
        ({"images": _IMAGES, "labels": _LABELS * 0}, "one class"),
        ({"images": _IMAGES[:0], "labels": _LABELS[:0]}, "no training examples|one class"),
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
    [_cut, _flipped, lambda _: b"", lambda _: b"PK not a zip file"],
    ids=["cut", "flipped", "empty", "text"],
)
def test_damaged_file(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = _saved(tmp_path, images=_IMAGES, labels=_LABELS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="not an intact"):
        load("arrays", path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]  # a payload

    path = _saved(tmp_path, images=np.array([Trap()], dtype=object), labels=_LABELS)
    with pytest.raises(UserError, match="pickle"):
        load("arrays", path)
    assert not (tmp_path / "sprung").exists()


_NEEDED = {"images": _IMAGES, "labels": _LABELS}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.where(_LABELS == 3, 300_000_000, _LABELS), r"[45] different numbers up to 300000000"),
        (np.where(_LABELS == 3, -1, _LABELS).astype(np.uint32), "4294967295.*-1 stored as uint32"),
        (np.where(_LABELS == 3, -1, _LABELS).astype(np.uint64), "-1 stored as uint64"),
        (
            np.where(_LABELS == 3, -1, _LABELS).astype(np.uint8),
            "up to 255, which is -1 stored as uint8",
        ),
        (_LABELS + 1, r"from 1 to 4, and none is 0.*subtract 1"),
        (np.where(_LABELS == 3, -7, _LABELS), r"holds -7 \(first at index 3\)"),
        (_LABELS.astype(np.float32), r"integers, got float32: store labels\.astype"),
        (np.where(_LABELS == 3, np.nan, _LABELS), "nan is no label"),
        (_LABELS + 0.5, "0.5 is no label"),
        (_LABELS == 1, "got bool"),
        (_LABELS[:, None], r"got \(20, 1\): give labels\.ravel"),
        (np.eye(4, dtype=np.int64)[_LABELS], r"labels\.argmax\(1\)"),
        (np.array(["a", "b"] * 10), "'classes'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("part", ["labels", "test_labels"])
def test_labels_that_are_none(labels: np.ndarray, message: str, part: str, tmp_path: Path) -> None:
    arrays = dict(_NEEDED, **({} if part == "labels" else {"test_images": _IMAGES}))
    if part == "test_labels" and "none is 0" in message:
        # The two parts together decide which classes there are.
        arrays["labels"] = labels
    path = _saved(tmp_path, **(arrays | {part: labels}))
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as caught:
        load("arrays", path)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_labels_beyond_the_names_of_classes(tmp_path: Path) -> None:
    labels = np.where(_LABELS == 3, -1, _LABELS).astype(np.uint8)
    path = _saved(tmp_path, images=_IMAGES, labels=labels, classes=np.array(["a", "b", "c", "d"]))
    with pytest.raises(
        UserError, match=r"0\.\.3, because 'classes' has 4.*255.*-1 stored as uint8"
    ):
        load("arrays", path)


def test_a_gap_is_a_class_without_an_image_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = np.where(_LABELS == 3, 5, _LABELS)
    source = load("arrays", _saved(tmp_path, images=_IMAGES, labels=labels))
    assert source.train.classes == ("0", "1", "2", "3", "4", "5")
    assert source.notes == ("no training example of 2 of 6 classes: 3, 4",)
    assert source.notes[0] in caplog.text


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "b", "a", "d"], "classes 0 and 2 are both called 'a'"),
        (["a", " ", "b", "c"], "class 1 has no name"),
        (["a", "b\udcff", "c", "d"], "class 1, .*is no text"),
    ],
)
def test_names_of_classes_that_are_none(classes: list[str], message: str, tmp_path: Path) -> None:
    path = _saved(tmp_path, **_NEEDED, classes=np.array(classes))
    with pytest.raises(UserError, match=message):
        load("arrays", path)


def test_other_names_are_told_what_was_found(tmp_path: Path) -> None:
    # As in Keras' mnist.npz.
    path = _saved(
        tmp_path, x_train=_IMAGES, y_train=_LABELS.astype(np.uint8), **{"x\x1b[2J": np.array([{}])}
    )
    with pytest.raises(UserError) as caught:
        load("arrays", path)
    said = str(caught.value)
    assert "no array 'images'" in said
    assert "x_train uint8 (20, 6, 5, 3), y_train uint8 (20,)" in said
    assert "(no plain array)" in said
    assert said.isprintable()


def test_a_declared_size_that_is_not_there_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape in (("images", (10**15, 28, 28)), ("labels", (10**15,))):
            with archive.open(f"{name}.npy", "w") as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(
        UserError, match=r"declared as uint8 \(1000000000000000, 28, 28\), but has 0"
    ):
        load("arrays", path)


def test_arrays_that_would_not_fit_into_memory_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Zeros: a bomb of 20 kB that is 20 MB.
    np.savez_compressed(
        tmp_path / "data.npz", images=np.zeros((20, 1000, 1000), np.uint8), labels=_LABELS
    )
    free = psutil.virtual_memory()._replace(available=10_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"0\.0 GB of arrays.*memory"):
        load("arrays", tmp_path / "data.npz")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
    bits=st.integers(1, 255),
    cut=st.booleans(),
)
def test_whatever_is_damaged_is_one_line(
    places: list[float], bits: int, cut: bool, tmp_path: Path
) -> None:
    path = _saved(tmp_path, images=_IMAGES[:, :, :, 0], labels=_LABELS)
    content = bytearray(path.read_bytes())
    for place in places:
        content[int(place * len(content))] ^= bits
    path.write_bytes(content[: int(places[0] * len(content))] if cut else content)
    said, source = "", None
    try:
        source = load("arrays", path)
    except UserError as error:
        said = str(error)
    assert said.isprintable()
    if source is not None:
        # What is neither the arrays nor their sums, such as a date, may change.
        images = np.concatenate([source.train.inputs.numpy(), source.test.inputs.numpy()])
        assert sorted(map(bytes, images)) == sorted(map(bytes, _IMAGES[:, None, :, :, 0]))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .npz file at .*data\.root"):
        load("arrays", tmp_path / "nothing.npz")


def test_a_lone_npy_is_not_an_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", _IMAGES)
    with pytest.raises(UserError, match=r"is an \.npy file of one array, not an \.npz file"):
        load("arrays", tmp_path / "images.npy")


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("t.csv", b"a,b,y\n1,2,3\n", "is a CSV file"),
        ("t.txt", "größe;y\n1;2\n".encode(), r"is a text file \(such as CSV\)"),
        ("t.npz", b"a,b,y\n1,2,3\n", "is a text file"),
        ("t.parquet", b"PAR1" + bytes(50), "is a Parquet file"),
        ("t.pkl", pickle.dumps({"inputs": 1}), "is a pickle file"),
    ],
)
def test_what_is_another_kind_of_file_is_called_so(
    name: str, content: bytes, kind: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{kind}.*numpy.savez.*function of your own"):
        load("arrays", tmp_path / name)


@pytest.mark.parametrize(
    ("shape", "first"),
    [
        ((3, 8, 2), None),
        ((28, 28, 1), False),
        ((1, 28, 28), True),
        ((16, 12, 3), False),
        ((4, 12, 16), True),
        ((48, 64, 2), False),
        ((2, 48, 64), True),
        ((6, 12, 12), True),
        ((12, 12, 6), False),
        ((7, 12, 12), None),
        ((16, 12, 8), None),
        ((8, 12, 16), None),
        ((16, 8, 8), None),
        ((3, 5, 3), None),
        ((32, 32, 32), None),
    ],
)
def test_channels_are_found_or_asked_for(
    shape: tuple[int, ...], first: bool | None, tmp_path: Path
) -> None:
    images = _rng.integers(0, 256, (20, *shape), dtype=np.uint8)
    path = _saved(tmp_path, images=images, labels=_LABELS)
    if first is None:
        with pytest.raises(UserError, match=r"ambiguous: call them 'inputs'.*transpose\(0, 3, 1"):
            load("arrays", path)
        return
    source = load("arrays", path)
    assert source.shape == (shape if first else (shape[2], *shape[:2]))
    assert source.notes == ()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int16", "int32", "uint16"])
@pytest.mark.parametrize("key", ["images", "inputs"])
def test_no_value_is_rounded(dtype: str, key: str, tmp_path: Path) -> None:
    # 6,400 different values, which fedkn once made 4 of.
    values = np.linspace(0, 1, 6400).reshape(100, 8, 8)
    images = (values if dtype.startswith("f") else values * 30_000).astype(dtype)
    given = images if key == "images" else images[:, None]
    source = load("arrays", _saved(tmp_path, **{key: given, "labels": np.arange(100) % 4}))
    found = source.train.joined(source.test).inputs.numpy()
    assert found.shape == (100, 1, 8, 8)
    assert found.dtype == (np.int32 if dtype == "uint16" else dtype)
    assert np.array_equal(np.unique(found), np.unique(images))


@pytest.mark.parametrize("shape", [(5,), (2, 9), (2, 4, 6), (1, 3, 4, 5)])
def test_inputs_of_one_to_four_axes(shape: tuple[int, ...], tmp_path: Path) -> None:
    inputs = _rng.standard_normal((20, *shape)).astype(np.float32)
    targets = _rng.standard_normal((20, 2))
    source = load("arrays", _saved(tmp_path, inputs=inputs, targets=targets))
    assert source.shape == shape
    assert source.num_classes == 0
    both = source.train.joined(source.test)
    order = [int(np.flatnonzero(targets[:, 0] == y)[0]) for y in targets[:, 0]]
    found = sorted(zip(both.targets[:, 0].tolist(), map(bytes, both.inputs.numpy()), strict=True))
    wanted = sorted(zip(targets[order, 0].astype("f4").tolist(), map(bytes, inputs), strict=True))
    assert found == wanted


def test_masks_may_have_a_number_of_no_class(tmp_path: Path) -> None:
    masks = (np.arange(20 * 30) % 3).reshape(20, 6, 5)
    masks[0, 0, 0] = 255
    names = np.array(["sky", "sea", "land"])
    path = _saved(tmp_path, images=_IMAGES, targets=masks.astype(np.uint8), classes=names)
    source = load("arrays", path)
    assert source.train.targets.shape[1:] == (6, 5)
    assert int(source.train.joined(source.test).targets.max()) == 255
    with pytest.raises(UserError, match="4 different numbers up to 255"):
        load("arrays", _saved(tmp_path, images=_IMAGES, targets=masks.astype(np.uint8)))


def test_clients_in_a_file(tmp_path: Path) -> None:
    clients = np.array(["bob", "ann"])[np.arange(20) % 2]
    source = load("arrays", _saved(tmp_path, **_NEEDED, clients=clients))
    assert source.train.origins is not None
    assert source.train.origins.names == ("ann", "bob")
    assert np.bincount(source.test.origins.ids).tolist() == [2, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({**_NEEDED, "inputs": _IMAGES}, "has both 'images' and 'inputs'"),
        ({**_NEEDED, "targets": _LABELS}, "has both 'labels' and 'targets'"),
        ({**_NEEDED, "clients": _LABELS[:5]}, "20 examples but 5 client ids"),
        ({**_NEEDED, "clients": _LABELS / 2}, r"'clients' must be \(N,\) integers or names"),
        ({"inputs": _IMAGES, "targets": _with_nan()[:, 2, 1]}, "'targets' holds nan at index"),
        ({"inputs": np.arange(20.0), "targets": _LABELS}, r"x\[:, None\]"),
    ],
)
def test_what_does_not_fit_of_any_kind(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load("arrays", _saved(tmp_path, **arrays))
    assert str(caught.value).isprintable()
