import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedkn.data.decoded import CACHE_FOLDER, Decoded
from fedkn.data.decoding import decode_files
from fedkn.data.sources import load
from fedkn.data.split import stratified_split
from fedkn.errors import UserError


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _picture(seed: int, width: int = 6, height: int = 4, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def _save(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Two classes, three training images and one test image each."""
    root = tmp_path / "data"
    for label, name in enumerate(("cat", "dog")):
        for number in range(3):
            _save(root / "train" / name / f"{number}.png", _picture(10 * label + number))
        _save(root / "test" / name / "0.png", _picture(10 * label + 5))
    return root


def _channels_first(picture: Image.Image) -> np.ndarray:
    return np.moveaxis(np.asarray(picture), 2, 0)


def test_train_and_test_folders(parts: Path) -> None:
    source = load("image_folder", parts)
    assert source.train.classes == ("cat", "dog")
    assert source.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.test.targets.tolist() == [0, 1]
    expected = [_channels_first(_picture(seed)) for seed in (0, 1, 2, 10, 11, 12)]
    assert np.array_equal(source.train.inputs.numpy(), np.stack(expected))
    assert np.array_equal(source.test.inputs[1].numpy(), _channels_first(_picture(15)))


def test_second_load_reads_the_cache_alone(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load("image_folder", parts)

    def no_more(*_: object) -> None:
        raise AssertionError("decoded twice")

    monkeypatch.setattr("fedkn.data.folder.decode_files", no_more)
    again = load("image_folder", parts)
    assert again.train.inputs.equal(first.train.inputs)
    assert again.test.inputs.equal(first.test.inputs)
    # Writing to the tensor must not reach the cache file.
    again.train.inputs.zero_()
    assert load("image_folder", parts).train.inputs.equal(first.train.inputs)


def _touch(root: Path) -> None:
    path = root / "train" / "cat" / "0.png"
    _save(path, _picture(99))
    os.utime(path, ns=(1, 1))


def _add(root: Path) -> None:
    _save(root / "train" / "cat" / "9.png", _picture(99))


def _rename(root: Path) -> None:
    (root / "train" / "cat" / "0.png").rename(root / "train" / "dog" / "9.png")


@pytest.mark.parametrize("change", [_touch, _add, _rename])
def test_a_changed_folder_is_decoded_anew(change: Callable[[Path], None], parts: Path) -> None:
    load("image_folder", parts)
    change(parts)
    source = load("image_folder", parts)
    files = sorted((parts / "train").rglob("*.png"))
    expected = np.stack([_channels_first(Image.open(path)) for path in files])
    assert np.array_equal(source.train.inputs.numpy(), expected)
    labels = [("cat", "dog").index(path.parent.name) for path in files]
    assert source.train.targets.tolist() == labels
    assert len(list((parts / CACHE_FOLDER).glob("*.npy"))) == 1


def test_classes_alone_hold_out_a_fixed_fifth(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for label, name in enumerate(("a", "b")):
        for number in range(10):
            _save(root / name / f"{number}.png", _picture(10 * label + number))
    source = load("image_folder", root)
    assert np.bincount(source.train.targets).tolist() == [8, 8]
    assert np.bincount(source.test.targets).tolist() == [2, 2]
    for data in (source.train, source.test):
        for image, label in zip(data.inputs, data.targets, strict=True):
            same = [
                seed
                for seed in range(20)
                if np.array_equal(image.numpy(), _channels_first(_picture(seed)))
            ]
            assert [seed // 10 for seed in same] == [int(label)]


def test_image_size_cuts_the_centre_and_lives_beside_the_native_size(parts: Path) -> None:
    native = load("image_folder", parts)
    _save(parts / "train" / "cat" / "9.png", _picture(7, width=9, height=20))
    small = load("image_folder", parts, image_size=4)
    assert small.train.inputs.shape == (7, 3, 4, 4)
    # 6 x 4 pixels: the central square needs no resizing.
    assert small.train.inputs[0].equal(native.train.inputs[0][:, :, 1:5])
    tall = _picture(7, width=9, height=20)
    expected = tall.resize((4, 4), Image.Resampling.BILINEAR, box=(0, 5.5, 9, 14.5))
    assert np.array_equal(small.train.inputs[3].numpy(), _channels_first(expected))
    (parts / "train" / "cat" / "9.png").unlink()
    load("image_folder", parts)
    assert len(list((parts / CACHE_FOLDER).glob("*.npy"))) == 2


def test_resizing_keeps_a_gradient(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (64, 1))
    for name in ("a", "b"):
        for number in range(3):
            _save(tmp_path / "data" / name / f"{number}.png", Image.fromarray(ramp))
    source = load("image_folder", tmp_path / "data", image_size=8)
    blocks = ramp.reshape(8, 8, 8, 8).mean(axis=(1, 3))
    assert source.train.inputs.shape[1:] == (1, 8, 8)
    assert np.abs(source.train.inputs[0, 0].numpy() - blocks)[:, 1:-1].max() <= 2


def test_different_sizes_name_the_option(parts: Path) -> None:
    _save(parts / "test" / "dog" / "1.png", _picture(1, width=7))
    with pytest.raises(UserError, match=r"6x4.*7x4.*data\.image_size"):
        load("image_folder", parts)
    assert not list((parts / CACHE_FOLDER).glob("*.npy"))


def test_one_colour_file_makes_all_rgb(parts: Path) -> None:
    for path in parts.rglob("*.png"):
        _save(path, _picture(3, mode="L"))
    assert load("image_folder", parts).shape[0] == 1
    _save(parts / "test" / "dog" / "0.png", _picture(3, mode="RGBA"))
    source = load("image_folder", parts)
    assert source.shape[0] == 3
    grey = np.asarray(_picture(3, mode="L"))
    assert np.array_equal(source.train.inputs[0].numpy(), np.stack([grey] * 3))


def test_photos_are_turned_upright(parts: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = _picture(0, width=4, height=6)
    turned.save(parts / "train" / "cat" / "0.png", exif=exif)
    source = load("image_folder", parts)
    assert np.array_equal(
        source.train.inputs[0].numpy(), _channels_first(turned.rotate(-90, expand=True))
    )


def test_hidden_and_foreign_files_are_no_images(parts: Path) -> None:
    (parts / "train" / "cat" / "notes.txt").write_text("x")
    (parts / "train" / "cat" / "._0.png").write_bytes(b"x")
    (parts / "train" / ".thumbnails").mkdir()
    _save(parts / "train" / "cat" / "deeper" / "3.PNG", _picture(3))
    source = load("image_folder", parts)
    assert np.bincount(source.train.targets).tolist() == [4, 3]


@pytest.mark.parametrize(
    "name", [None, ".gitkeep", ".DS_Store", "._0.png", "desktop.ini", "Thumbs.db", ".deep/0.png"]
)
def test_a_class_folder_with_hidden_files_alone_is_empty(name: str | None, parts: Path) -> None:
    for part in ("train", "test"):
        (parts / part / "newt").mkdir()
        if name:
            path = parts / part / "newt" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"")
    source = load("image_folder", parts)
    assert source.train.classes == ("cat", "dog", "newt")
    assert source.notes == ("no training example of 1 of 3 classes: newt",)


def test_what_systems_leave_behind_is_no_class_and_holds_no_images(parts: Path) -> None:
    left = ("__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
    for name in left:
        _save(parts / "train" / name / "0.png", _picture(0))
        _save(parts / name / "0.png", _picture(0))
    # A thumbnail, as Synology makes one of every picture.
    _save(parts / "train" / "cat" / "@eaDir" / "0.png" / "thumb.png", _picture(0))
    _save(parts / "train" / "cat" / "__MACOSX" / "0.png", _picture(0))
    source = load("image_folder", parts)
    assert source.train.classes == ("cat", "dog")
    assert len(source.train) == 6
    assert source.notes == ()


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAIN", "testing"), ("Training", "VAL")])
def test_parts_may_be_spelt_otherwise(names: tuple[str, str], parts: Path) -> None:
    expected = load("image_folder", parts)
    for old, new in zip(("train", "test"), names, strict=True):
        (parts / old).rename(parts / new)
    source = load("image_folder", parts)
    assert source.train.inputs.equal(expected.train.inputs)
    assert source.test.inputs.equal(expected.test.inputs)
    assert not source.held_out
    took_val = names[1] == "VAL"
    assert [note for note in source.notes if "there is no test/" in note] == (
        ["the test images are those of VAL/, because there is no test/"] if took_val else []
    )


def test_a_part_twice_is_refused_and_val_beside_test_is_named(parts: Path) -> None:
    _save(parts / "val" / "cat" / "0.png", _picture(0))
    (note,) = load("image_folder", parts).notes
    assert "val/ is not used" in note
    _save(parts / "Train" / "cat" / "0.png", _picture(0))
    with pytest.raises(UserError, match=r"both Train/ and train/"):
        load("image_folder", parts)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    # As one of CIFAR-100 is.
    for label, name in enumerate(("bus", "train", "test")):
        for number in range(5):
            _save(tmp_path / "data" / name / f"{number}.png", _picture(10 * label + number))
    assert load("image_folder", tmp_path / "data").train.classes == ("bus", "test", "train")


def test_parts_without_classes_are_no_classes(tmp_path: Path) -> None:
    for name in ("train", "test"):
        _save(tmp_path / "data" / name / "0.png", _picture(0))
    with pytest.raises(UserError, match="train must hold one folder for each class"):
        load("image_folder", tmp_path / "data")


def test_what_is_passed_over_is_named(parts: Path, caplog: pytest.LogCaptureFixture) -> None:
    (parts / "extra").mkdir()
    _save(parts / "train" / "loose.png", _picture(0))
    for number in range(3):
        (parts / "train" / "cat" / f"{number}.heic").write_bytes(b"x")
    notes = load("image_folder", parts).notes
    assert any("extra" in note for note in notes)
    assert any("loose.png" in note for note in notes)
    assert any(".heic: 3" in note for note in notes)
    assert all(note in caplog.text for note in notes)


def _odd(root: Path) -> dict[str, str]:
    """Put beside the good files every kind of bad one; return what is wrong with each."""
    folder = root / "train" / "cat"
    good = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "postscript.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    Image.fromarray(np.zeros((4, 6), dtype=np.uint16)).save(folder / "deep.png")
    # 100 million pixels in a few kilobytes.
    Image.new("1", (10_000, 10_000)).save(folder / "huge.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "nowhere.png").symlink_to(root / "nowhere")
    (folder / "folder.png").symlink_to(root)
    with socket.socket(socket.AF_UNIX) as bound:
        here = Path.cwd()
        os.chdir(folder)  # the address of a socket is short
        bound.bind("socket.png")
        os.chdir(here)
    return {
        "cut.png": "damaged|cannot be read",
        "empty.png": "is empty",
        "postscript.png": "none of PNG, JPEG",
        "deep.png": "more than 8 bits a channel, and most others 8",
        "huge.png": "89,478,485 pixels",
        "pipe.png": "a named pipe",
        "device.png": "a device",
        "loop.png": "symbolic links",
        "nowhere.png": "No such file",
        "folder.png": "a folder",
        "socket.png": "a socket",
    }


@pytest.mark.filterwarnings("error")
def test_all_bad_files_are_named_at_once_and_can_be_left_out(
    parts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load("image_folder", parts)
    odd = _odd(parts)
    with pytest.raises(
        UserError, match=r"11 of 19 image files.*and 1 more.*skip_damaged"
    ) as caught:
        load("image_folder", parts)
    said = str(caught.value)
    assert said.isprintable()
    assert sum(bool(re.search(rf"{name} [^/]*({why})", said)) for name, why in odd.items()) == 10
    for _ in range(2):  # decoded, then from the cache
        source = load("image_folder", parts, skip_damaged=True)
        assert source.train.inputs.equal(expected.train.inputs)
        assert source.train.targets.equal(expected.train.targets)
        assert source.test.inputs.equal(expected.test.inputs)
        (note,) = source.notes
        assert "left out: 11 of 19 image files" in note
        assert note in caplog.text
    # The cache was written by one who left them out.
    with pytest.raises(UserError, match="11 of 19 image files"):
        load("image_folder", parts)


def test_a_folder_of_bad_files_alone(parts: Path) -> None:
    for path in parts.rglob("*.png"):
        path.write_bytes(b"hello")
    with pytest.raises(UserError, match="8 of 8 image files cannot be used"):
        load("image_folder", parts, skip_damaged=True)


def test_a_file_that_is_too_large_is_not_read(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedkn.data.decoding._MOST_BYTES", 2**20)
    with (parts / "train" / "cat" / "0.png").open("ab") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(UserError, match="more than 1 MiB"):
        load("image_folder", parts)


def test_limits_choose_before_they_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    for label, name in enumerate("abc"):
        for number in range(20):
            _save(root / name / f"{number}.png", _picture(100 * label + number))
    whole = load("image_folder", root)
    asked: list[str] = []

    def decode(paths: list[str], *arguments: Any, **options: Any) -> Decoded:
        asked.extend(paths)
        return decode_files(paths, *arguments, **options)

    monkeypatch.setattr("fedkn.data.folder.decode_files", decode)
    for _ in range(2):
        part = load("image_folder", root, train_limit=9, test_limit=6)
        assert len(asked) == 15
        for name, data, all_data, limit in (
            ("train", part.train, whole.train, 9),
            ("test", part.test, whole.test, 6),
        ):
            # As it was chosen when all were decoded.
            fraction = limit / len(all_data)
            _, chosen = stratified_split(all_data.targets, fraction, 0, f"limit-{name}")
            assert data.inputs.equal(all_data.inputs[chosen])
            assert data.targets.equal(all_data.targets[chosen])
    # The caches lie side by side.
    assert len(load("image_folder", root).train) == 48
    assert len(asked) == 15


def test_names_that_are_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = os.fsencode(tmp_path / "data")
    for label, name in enumerate((b"caf\xe9", "thé".encode())):
        for number in range(5):
            path = Path(os.fsdecode(b"%s/%s/\xff%d.png" % (root, name, number)))
            _save(path, _picture(10 * label + number))
    for _ in range(2):
        source = load("image_folder", tmp_path / "data")
        assert source.train.classes == ("caf\\xe9", "thé")
        assert np.bincount(source.train.targets).tolist() == [4, 4]
    (tmp_path / "data" / "caf\\xe9").mkdir()
    with pytest.raises(UserError, match="both read"):
        load("image_folder", tmp_path / "data")


def test_a_device_may_lack_a_class(parts: Path) -> None:
    (parts / "train" / "newt").mkdir()
    source = load("image_folder", parts)
    assert source.train.classes == ("cat", "dog", "newt")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*data\.root"):
        load("image_folder", tmp_path / "nowhere")


def _one_class(root: Path) -> None:
    for part in ("train", "test"):
        for path in (root / part / "dog").iterdir():
            path.unlink()
        (root / part / "dog").rmdir()


def _no_test(root: Path) -> None:
    (root / "test").rename(root.parent / "elsewhere")


def _strange_test_class(root: Path) -> None:
    _save(root / "test" / "cow" / "0.png", _picture(0))


def _empty(root: Path) -> None:
    for path in root.rglob("*.png"):
        path.unlink()


def _foreign(root: Path) -> None:
    for path in (root / "train" / "cat").glob("*.png"):
        path.rename(path.with_suffix(".heic"))


def _broken(root: Path) -> None:
    path = root / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:60])


def _not_an_image(root: Path) -> None:
    (root / "train" / "cat" / "1.png").write_text("hello")


def _deep(root: Path) -> None:
    Image.fromarray(np.zeros((4, 6), dtype=np.uint16)).save(root / "train" / "cat" / "1.png")


def _dangling(root: Path) -> None:
    (root / "train" / "cat" / "7.png").symlink_to(root / "nowhere.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one_class, "at least two; it has only 'cat'"),
        (_no_test, "no test/"),
        (_strange_test_class, "lacks: cow"),
        (_empty, "no images"),
        (_foreign, "cat holds files but no images"),
        (_broken, r"1 of 8 image files cannot be used: .*1\.png (is damaged|cannot be read)"),
        (_not_an_image, r"cannot be used: .*1\.png is damaged, or is none of PNG"),
        (_deep, "more than 8 bits a channel, and most others 8 bits"),
        (_dangling, r"7\.png cannot be read: No such file"),
    ],
)
def test_unfit_folders(change: Callable[[Path], None], message: str, parts: Path) -> None:
    change(parts)
    with pytest.raises(UserError, match=message) as caught:
        load("image_folder", parts)
    assert "\n" not in str(caught.value)
    assert not list(parts.parent.rglob("*.npy"))
    assert not list(parts.parent.rglob("partial-*"))


def test_a_folder_of_16_bit_images_keeps_them_and_so_does_its_cache(parts: Path) -> None:
    rng = np.random.default_rng(0)
    expected = {}
    for path in sorted(parts.rglob("*.png")):
        expected[path] = rng.integers(0, 65536, (4, 6)).astype(np.uint16)
        Image.fromarray(expected[path]).save(path)
    for _ in ("decoded", "from the cache"):
        source = load("image_folder", parts)
        assert source.train.inputs.dtype == torch.int32
        found = sorted(map(bytes, torch.cat([source.train.inputs, source.test.inputs]).numpy()))
        assert found == sorted(bytes(pixels.astype("<i4")) for pixels in expected.values())


def _clients(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for client, classes in (("ann", "cat dog"), ("bob", "dog"), ("cy", "cat dog emu")):
        for name in classes.split():
            (root / client / name).mkdir(parents=True)
            for number in range(5):
                pixels = rng.integers(0, 256, (4, 6), dtype=np.uint8)
                Image.fromarray(pixels).save(root / client / name / f"{number}.png")
    return root


def test_folders_of_clients_say_whose_each_image_is(tmp_path: Path) -> None:
    source = load("client_folders", _clients(tmp_path / "data"))
    assert source.train.classes == ("cat", "dog", "emu")
    for part, each in ((source.train, 4), (source.test, 1)):
        assert part.origins is not None
        assert part.origins.names == ("ann", "bob", "cy")
        # A fifth of every client's own is for tests.
        assert torch.bincount(part.origins.ids).tolist() == [2 * each, each, 3 * each]
        for image, label, client in zip(part.inputs, part.targets, part.origins.ids, strict=True):
            folder = tmp_path / "data" / part.origins.names[client] / part.classes[label]
            files = [np.asarray(Image.open(file)) for file in folder.iterdir()]
            assert any(np.array_equal(image[0].numpy(), pixels) for pixels in files)
    limited_ = load("client_folders", tmp_path / "data", train_limit=6)
    assert limited_.train.origins is not None
    assert torch.bincount(limited_.train.origins.ids).tolist() == [2, 1, 3]


def _loose(root: Path) -> None:
    (root / "dee").mkdir()
    Image.new("L", (6, 4)).save(root / "dee" / "0.png")


def _nothing(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def _as_parts(root: Path) -> None:
    (root / "ann").rename(root / "train")
    (root / "cy").rename(root / "test")
    shutil.rmtree(root / "bob")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_loose, r"dee holds images \(such as 0\.png\) but no class folders: put them"),
        (_nothing, r"must hold ROOT/<client>/<class>/\*.*0 folders with 0"),
        (_as_parts, "has the parts test, train, not clients: set data.source = 'image_folder'"),
    ],
)
def test_folders_that_are_none_of_clients(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    change(_clients(tmp_path / "data"))
    with pytest.raises(UserError, match=message) as caught:
        load("client_folders", tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_client_without_an_image_is_named(tmp_path: Path) -> None:
    (_clients(tmp_path / "data") / "dan" / "cat").mkdir(parents=True)
    source = load("client_folders", tmp_path / "data")
    assert source.notes == ("1 of 4 clients without an image: dan",)
