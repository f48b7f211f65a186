import gzip
import hashlib
import pickle
import struct
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedkn.data.sources import load
from fedkn.data.vision import import_torchvision
from fedkn.errors import UserError

_rng = np.random.default_rng(0)


def _write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def _write_idx_source(folder: Path, prefixes: tuple[str, str], classes: int) -> list[np.ndarray]:
    """Write 2 x classes training images and as many test images of 28 x 28; return the pixels."""
    pixels = []
    for prefix in prefixes:
        labels = np.arange(2 * classes) % classes
        images = _rng.integers(0, 256, (2 * classes, 28, 28), dtype=np.uint8)
        _write_idx(folder / f"{prefix}-images-idx3-ubyte", images)
        _write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels)
        pixels.append(images)
    return pixels


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_mnist_files(name: str, folder: str, tmp_path: Path) -> None:
    train, test = _write_idx_source(tmp_path / folder / "raw", ("train", "t10k"), 10)
    source = load(name, tmp_path)
    assert np.array_equal(source.train.inputs[:, 0].numpy(), train)
    assert np.array_equal(source.test.inputs[:, 0].numpy(), test)
    assert source.train.targets.tolist() == [*range(10), *range(10)]
    assert source.num_classes == 10


def test_emnist_is_the_balanced_split_turned_upright(tmp_path: Path) -> None:
    prefixes = ("emnist-balanced-train", "emnist-balanced-test")
    train, _ = _write_idx_source(tmp_path / "EMNIST" / "raw", prefixes, 47)
    source = load("emnist", tmp_path)
    assert source.num_classes == 47
    assert np.array_equal(source.train.inputs[:, 0].numpy(), train.transpose(0, 2, 1))
    assert source.train.classes[10:13] == ("A", "B", "C")


def _pickled(path: Path, content: dict[str, object]) -> list[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


@pytest.mark.parametrize(
    "case",
    [
        ("cifar10", "CIFAR10", "cifar-10-batches-py", "labels"),
        ("cifar100", "CIFAR100", "cifar-100-python", "fine_labels"),
    ],
    ids=lambda case: case[0],
)
def test_cifar_files(
    case: tuple[str, str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, dataset, folder, key = case
    meta = f"{key.removesuffix('s')}_names"
    rows = _rng.integers(0, 256, (6, 3072), dtype=np.uint8)
    train = _pickled(tmp_path / folder / "train", {"data": rows[:4], key: [0, 1, 2, 0]})
    test = _pickled(tmp_path / folder / "test", {"data": rows[4:], key: [2, 1]})
    names = _pickled(tmp_path / folder / "meta", {meta: ["a", "b", "c"]})
    cls = getattr(import_torchvision().datasets, dataset)
    monkeypatch.setattr(cls, "train_list", [train])
    monkeypatch.setattr(cls, "test_list", [test])
    monkeypatch.setattr(cls, "meta", {"filename": names[0], "key": meta, "md5": names[1]})
    source = load(name, tmp_path)
    # A row holds the red, the green, then the blue plane.
    assert np.array_equal(source.train.inputs.numpy(), rows[:4].reshape(4, 3, 32, 32))
    assert np.array_equal(source.test.inputs.numpy(), rows[4:].reshape(2, 3, 32, 32))
    assert source.train.targets.tolist() == [0, 1, 2, 0]
    assert source.test.classes == ("a", "b", "c")
    (tmp_path / folder / "train").write_bytes(b"damaged")
    with pytest.raises(UserError, match=f"no intact '{name}' data in .*{folder}"):
        load(name, tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "emnist", "cifar10", "cifar100"])
def test_root_without_the_data_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root \(--root\).*data\.download=true") as caught:
        load(name, tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08\x03", b"garbage" * 10])
def test_damaged_idx_file(content: bytes, tmp_path: Path) -> None:
    _write_idx_source(tmp_path / "MNIST" / "raw", ("train", "t10k"), 10)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read 'mnist' in .*MNIST/raw.*--download"):
        load("mnist", tmp_path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]),
    places=st.lists(st.integers(0, 16), min_size=1, max_size=4),
    bits=st.integers(1, 255),
    keep=st.floats(0, 4),
)
def test_whatever_is_damaged_is_one_line(
    name: str, places: list[int], bits: int, keep: float, tmp_path: Path
) -> None:
    folder = tmp_path / "MNIST" / "raw"
    _write_idx_source(folder, ("train", "t10k"), 10)
    content = bytearray((folder / name).read_bytes())
    for place in places:
        content[place] ^= bits
    (folder / name).write_bytes(content[: int(keep * len(content))] if keep < 1 else content)
    said = ""
    try:
        load("mnist", tmp_path)
    except UserError as error:
        said = str(error)
    assert said.isprintable()


def test_images_and_labels_of_different_length(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    _write_idx_source(folder, ("train", "t10k"), 10)
    _write_idx(folder / "t10k-labels-idx1-ubyte", np.arange(3))
    with pytest.raises(UserError, match="20 inputs but 3 targets"):
        load("mnist", tmp_path)


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """The address of a local server of MNIST files, with which torchvision is told to make do."""
    origin = tmp_path / "origin"
    _write_idx_source(origin, ("train", "t10k"), 10)
    for path in list(origin.iterdir()):
        (origin / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    handler = partial(_SilentHandler, directory=str(origin))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


class _SilentHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_download_only_when_asked_and_its_failure_is_told(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    cls = import_torchvision().datasets.MNIST
    packed = sorted((tmp_path / "origin").glob("*.gz"))
    resources = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in packed]
    monkeypatch.setattr(cls, "resources", resources)
    monkeypatch.setattr(cls, "mirrors", [mirror])
    with pytest.raises(UserError, match="no intact"):
        load("mnist", tmp_path / "data")
    assert len(load("mnist", tmp_path / "data", download=True).train) == 20
    assert len(load("mnist", tmp_path / "data").train) == 20
    monkeypatch.setattr(cls, "mirrors", [f"{mirror}nothing/"])
    with pytest.raises(UserError, match="cannot download or read 'mnist'") as caught:
        load("mnist", tmp_path / "other", download=True)
    assert "\n" not in str(caught.value)
