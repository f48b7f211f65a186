"""The record of a run's data: what is refused, of which source, and where nothing was recorded."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import data_summary
from server.run_data import DataChanged, hold_to_data, recorded_data
from tests.forgotten import forget_data
from tests.server.fake_grid import small

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (60, 8, 8), dtype=np.uint8)
LABELS = np.arange(60) % 3
TESTS = RNG.integers(0, 256, (12, 8, 8), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _new_process():
    forget_data()
    yield
    forget_data()


def held(folder: Path, config: ExperimentConfig) -> bool:
    """Hold `config` to its data as a process that was started just now does."""
    forget_data()
    return hold_to_data(folder, config.data, data_summary(config))


def change_of(folder: Path, config: ExperimentConfig) -> str:
    """Return what the refusal says that changed; it must say it all in one line."""
    with pytest.raises(DataChanged) as caught:
        held(folder, config)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    begun, found, _ = text.replace(". Put back", "begun: ").split("begun: ", 2)
    assert begun.startswith("the data changed since")
    return found


# -- an .npz file ---------------------------------------------------------------------------------


def arrays(path: Path, **changes: np.ndarray) -> ExperimentConfig:
    given = {"images": IMAGES, "labels": LABELS, "classes": np.array(["cat", "dog", "owl"])}
    np.savez(path / "a.npz", **(given | changes))
    return small(data__source="arrays", data__root=str(path / "a.npz"), data__test_limit=0)


ORDER = np.random.default_rng(1).permutation(60)
PIXEL = IMAGES.copy()
PIXEL[17, 3, 3] ^= 1
WITH_TESTS = {"test_images": TESTS, "test_labels": np.arange(12) % 3}
TEST_PIXEL = TESTS.copy()
TEST_PIXEL[0, 0, 0] ^= 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"labels": (LABELS + 1) % 3}, "labels"),
        ({"labels": np.where(np.arange(60) == 7, 2, LABELS)}, "labels"),
        ({"images": PIXEL}, "images"),
        ({"images": IMAGES[ORDER], "labels": LABELS[ORDER]}, "order of the images"),
        ({"classes": np.array(["dog", "cat", "owl"])}, "class names (cat, dog, owl; now dog"),
        ({"images": IMAGES[:59], "labels": LABELS[:59]}, "now "),
        ({"images": IMAGES[:, :7]}, "shape of the images (1x8x8, now 1x7x8)"),
        (WITH_TESTS, "test images"),
    ],
)
def test_a_change_of_arrays_is_refused_by_name(tmp_path, changes, named):
    run = tmp_path / "run"
    assert held(run, arrays(tmp_path))
    assert held(run, arrays(tmp_path))
    assert named in change_of(run, arrays(tmp_path, **changes))
    # Nothing was recorded anew, so the first data are still those of the run.
    assert held(run, arrays(tmp_path))


def test_of_tests_that_were_given_only_these_are_named(tmp_path):
    assert held(tmp_path / "run", arrays(tmp_path, **WITH_TESTS))
    changed = arrays(tmp_path, **WITH_TESTS | {"test_images": TEST_PIXEL})
    assert change_of(tmp_path / "run", changed) == "test images"
    labelled = arrays(tmp_path, **WITH_TESTS | {"test_labels": np.arange(12) // 4})
    assert change_of(tmp_path / "run", labelled) == "labels"


def test_the_same_images_written_otherwise_are_the_same_data(tmp_path):
    """What the file is like, when it was written and in which type labels are, is no matter."""
    assert held(tmp_path / "run", arrays(tmp_path))
    assert held(tmp_path / "run", arrays(tmp_path, labels=LABELS.astype("u1")))
    # Other numbers are other data, whatever a scaling would make of them.
    floats = change_of(tmp_path / "run", arrays(tmp_path, images=IMAGES / 255))
    assert "shape of the images (1x8x8, now float64 1x8x8)" in floats


# -- folders of images, torchvision's files, digits -----------------------------------------------


def pictures(path: Path) -> ExperimentConfig:
    for part, images in (("train", IMAGES[:24]), ("test", TESTS)):
        for index, image in enumerate(images):
            folder = path / part / ("cat", "dog", "owl")[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{index:02d}.png")
    return small(data__source="image_folder", data__root=str(path), data__test_limit=0)


def _rename_a_class(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "cat").rename(root / part / "cow")


def _swap_two_classes(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "cat").rename(root / part / "x")
        (root / part / "dog").rename(root / part / "cat")
        (root / part / "x").rename(root / part / "dog")


def _repaint(root: Path) -> None:
    Image.fromarray(255 - IMAGES[0]).save(root / "train" / "cat" / "00.png")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_rename_a_class, "class names (cat, dog, owl; now cow, dog, owl)"),
        (_swap_two_classes, "labels"),
        (_repaint, "images"),
        (lambda root: (root / "train" / "cat" / "00.png").unlink(), "now "),
        (lambda root: (root / "test" / "cat" / "00.png").unlink(), "test images (12, now 11)"),
        (lambda root: shutil.copy(root / "test/owl/02.png", root / "train/owl/99.png"), "now "),
        (
            lambda root: (root / "train/cat/00.png").rename(root / "train/dog/00.png"),
            "labels",
        ),
    ],
)
def test_a_change_of_an_image_folder_is_refused_by_name(
    tmp_path: Path, change: Callable[[Path], object], named: str
):
    config = pictures(tmp_path / "data")
    assert held(tmp_path / "run", config)
    change(tmp_path / "data")
    assert named in change_of(tmp_path / "run", config)


def test_a_folder_that_was_copied_elsewhere_and_back_is_the_same(tmp_path):
    """Times of change differ, and the images are decoded anew."""
    config = pictures(tmp_path / "data")
    assert held(tmp_path / "run", config)
    hidden = shutil.ignore_patterns(".*")
    shutil.copytree(
        tmp_path / "data", tmp_path / "copy", ignore=hidden, copy_function=shutil.copyfile
    )
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "copy").rename(tmp_path / "data")
    assert held(tmp_path / "run", config)


def test_a_change_of_torchvisions_files_is_refused(tmp_path):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 60), ("t10k", 20)):
        for kind, values in (
            ("images-idx3", RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
        ):
            header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + values.tobytes())
    config = small(data__source="mnist", data__root=str(tmp_path))
    assert held(tmp_path / "run", config)
    file = raw / "train-labels-idx1-ubyte"
    content = bytearray(file.read_bytes())
    content[8], content[9] = content[9], content[8]
    file.write_bytes(content)
    assert change_of(tmp_path / "run", config) == "labels"


def test_digits_are_the_same_in_every_process(tmp_path):
    for _ in range(2):
        assert held(tmp_path, small())
    (entry,) = recorded_data(tmp_path)
    assert entry.summary.classes == tuple("0123456789")
    assert entry.summary.fingerprint is not None
    # 15% of 1,438 are for validation; small() takes 60 tests.
    assert entry.summary.fingerprint.counts == (1222, 216, 60)


# -- the record -----------------------------------------------------------------------------------


def test_another_choice_of_images_is_another_entry(tmp_path):
    """Cells of their own settings may share a folder under flwr run; each is held to its own."""
    assert held(tmp_path, small())
    assert held(tmp_path, small(data__train_limit=300))
    assert held(tmp_path, small(data__flip=True, normalizer__name="kernel", seed=3))
    assert [entry.settings["train_limit"] for entry in recorded_data(tmp_path)] == [0, 300]


def test_a_setting_that_there_was_not_yet_makes_no_other_choice(tmp_path):
    """Else every run of an earlier version would count as one of other images, and go unchecked."""
    config = arrays(tmp_path)
    assert held(tmp_path / "run", config)
    path = tmp_path / "run" / "data.json"
    record = json.loads(path.read_text())
    del record["data"][0]["settings"]["image_size"]
    path.write_text(json.dumps(record))
    assert "labels" in change_of(tmp_path / "run", arrays(tmp_path, labels=(LABELS + 1) % 3))


def test_a_run_of_an_earlier_fedkn_has_nothing_to_compare_with(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"cell": "a", "kind": "start"}\n')
    assert not held(tmp_path, small())
    assert held(tmp_path, small())
    (entry,) = recorded_data(tmp_path)
    assert entry.summary == data_summary(small())


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b'{"data": 1}', b'{"data": [{}]}', b"\xff", b"[" * 9000]
)
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.json") as caught:
        held(tmp_path, small())
    assert "\n" not in str(caught.value)
    assert (tmp_path / "data.json").read_bytes() == content


def test_the_record_is_plain_json(tmp_path):
    held(tmp_path, arrays(tmp_path))
    (entry,) = json.loads((tmp_path / "data.json").read_text())["data"]
    assert entry["classes"] == ["cat", "dog", "owl"]
    assert entry["shape"] == [1, 8, 8]
    assert entry["settings"]["source"] == "arrays"
    assert len(entry["mean"]) == len(entry["deviation"]) == 1
    assert sum(entry["fingerprint"]["counts"]) == 60
