"""Data sets made here and saved by the real library."""

import io
import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedkn.data.own import load_own_source
from fedkn.data.sources import load
from fedkn.errors import UserError

datasets = pytest.importorskip("datasets")

_PIXELS = np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
_LABELS = [number % 3 for number in range(20)]
_CLIENTS = ["ann", "bob", "cy", "dee"] * 5


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def _pictures(pixels: np.ndarray = _PIXELS) -> Any:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog", "emu"]),
            "owner": datasets.Value("string"),
        }
    )
    columns = {
        "image": [{"bytes": _png(one), "path": None} for one in pixels],
        "label": _LABELS[: len(pixels)],
        "owner": _CLIENTS[: len(pixels)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_saved_images_come_back_with_their_classes_and_clients(tmp_path: Path) -> None:
    splits = datasets.DatasetDict({"train": _pictures(), "test": _pictures(_PIXELS[:4])})
    splits.save_to_disk(tmp_path / "saved")
    before = dict(os.environ)
    source = load("huggingface", tmp_path / "saved", options={"client": "owner"})
    assert dict(os.environ) == before
    assert source.train.classes == ("cat", "dog", "emu")
    assert source.train.inputs.dtype == torch.uint8
    assert np.array_equal(source.train.inputs.permute(0, 2, 3, 1).numpy(), _PIXELS)
    assert source.train.targets.tolist() == _LABELS
    assert len(source.test) == 4
    assert source.train.origins is not None
    names = [source.train.origins.names[one] for one in source.train.origins.ids]
    assert names == _CLIENTS


def test_images_of_16_bits_and_resized_ones(tmp_path: Path) -> None:
    deep = np.random.default_rng(1).integers(0, 65536, (20, 6, 5)).astype(np.uint16)
    _pictures(deep).save_to_disk(tmp_path / "deep")
    source = load("huggingface", tmp_path / "deep")
    assert source.held_out
    found = torch.cat([source.train.inputs, source.test.inputs])[:, 0].numpy()
    assert sorted(map(bytes, found)) == sorted(bytes(one.astype("<i4")) for one in deep)
    _pictures().save_to_disk(tmp_path / "plain")
    assert load("huggingface", tmp_path / "plain", image_size=3).shape == (3, 3, 3)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int16", "uint8"])
def test_numbers_keep_their_type_and_every_bit(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    values = (rng.standard_normal((30, 2, 3)) * 50).astype(dtype)
    targets = rng.standard_normal(30).astype(np.float32)
    features = datasets.Features(
        {"signal": datasets.Array2D((2, 3), dtype), "y": datasets.Value("float32")}
    )
    saved = datasets.Dataset.from_dict({"signal": values, "y": targets}, features=features)
    saved.save_to_disk(tmp_path / "saved")
    source = load("huggingface", tmp_path / "saved", options={"input": "signal"})
    assert str(source.train.inputs.dtype) == f"torch.{dtype}"
    assert source.train.classes == ()
    found = torch.cat([source.train.inputs, source.test.inputs]).numpy()
    order = np.argsort(torch.cat([source.train.targets, source.test.targets]).numpy())
    assert np.array_equal(found[order], values[np.argsort(targets)])


def test_what_a_function_returns_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    splits = datasets.DatasetDict({"train": _pictures(), "validation": _pictures(_PIXELS[:4])})
    source = load_own_source("mine:data", lambda: splits, None, {})
    assert np.array_equal(source.train.inputs.permute(0, 2, 3, 1).numpy(), _PIXELS)
    assert len(source.test) == 4
    pair = load_own_source("mine:data", lambda: (_pictures(), _pictures(_PIXELS[:4])), None, {})
    assert pair.train.inputs.equal(source.train.inputs)
    assert pair.train.classes == ("cat", "dog", "emu")


def _ragged() -> Any:
    return datasets.Dataset.from_dict({"x": [[1.0, 2.0], [3.0]] * 5, "y": [0.0] * 10})


def _missing() -> Any:
    return datasets.Dataset.from_dict({"x": [[1.0]] * 9 + [[2.0]], "y": [0.5] * 9 + [None]})


def _text() -> Any:
    return datasets.Dataset.from_dict({"x": ["a", "b"] * 5, "y": [0, 1] * 5})


def _broken_image() -> Any:
    saved = _pictures()
    features = saved.features
    columns = saved.cast_column("image", datasets.Image(decode=False)).to_dict()
    columns["image"][3]["bytes"] = b"%!PS-Adobe"
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (_pictures, {"input": "pictures"}, "no column 'pictures' but image, label, owner"),
        (_pictures, {"inputs": "image"}, "data.options.inputs is none of source 'huggingface'"),
        (_pictures, {"test": "test"}, "has no splits: leave data.options.test out"),
        (_pictures, {"target": "owner"}, "'train owner' must hold integers"),
        (_ragged, {}, "'x' holds lists of 1 to 2 values"),
        (_missing, {}, "'y' lacks 1 values"),
        (_text, {}, "'train x' must hold numbers, got <U1"),
        (
            _broken_image,
            {},
            "1 of 20 image files cannot be used: .*'image' 3 is damaged, or is none",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    make: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make().save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=message) as caught:
        load("huggingface", tmp_path / "saved", options=options)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set that save_to_disk wrote"):
        load("huggingface", tmp_path)
    with pytest.raises(UserError, match="no folder"):
        load("huggingface", tmp_path / "nowhere")


def test_without_the_library_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'fedkn\[huggingface\]'"):
        load("huggingface", tmp_path)
