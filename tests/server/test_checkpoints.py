from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkn.data.fingerprint import Fingerprint
from fedkn.data.summary import DataSummary
from fedkn.errors import UserError
from server import checkpoints as module
from server.checkpoints import Checkpoint, CheckpointNotWritten, CheckpointStore, weights_sha256
from server.rounds.participation import Participation

CONFIG = {"seed": 0, "train.batch_size": 2, "normalizer.name": "kernel"}


def checkpoint(round_: int) -> Checkpoint:
    rng = np.random.default_rng(round_)
    tensors = {
        "b.weight": rng.normal(size=(2, 3)).astype(np.float32),
        "a.bias": np.array(1.5, np.float32),
        "count": np.arange(3),
        "none": np.zeros((0, 2), np.float32),
        "turned": np.asfortranarray(rng.normal(size=(3, 2))),
    }
    participation = Participation("ab12" * 4, np.array([0, round_, 7]))
    return Checkpoint(round_, tensors, {"v_t/b.weight": rng.normal(size=(2, 3))}, participation)


def store(folder: Path, keep: int = 3, config=CONFIG) -> CheckpointStore:
    return CheckpointStore(folder, keep, config)


def filled(folder: Path, rounds: int = 3) -> CheckpointStore:
    kept = store(folder)
    for round_ in range(1, rounds + 1):
        kept.save(checkpoint(round_))
    return kept


def assert_same(one: Checkpoint | None, other: Checkpoint) -> None:
    assert one is not None
    assert one.round_ == other.round_
    for ours, theirs in ((one.tensors, other.tensors), (one.strategy, other.strategy)):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
            np.testing.assert_array_equal(ours[name], value)
    assert one.participation.token == other.participation.token
    np.testing.assert_array_equal(one.participation.last, other.participation.last)


def path(folder: Path, round_: int) -> Path:
    return folder / f"checkpoint-{round_:06d}.safetensors"


def test_what_was_saved_comes_back(tmp_path):
    assert_same(filled(tmp_path / "cells" / "a").load_newest(), checkpoint(3))
    assert_same(store(tmp_path / "cells" / "a").load_newest(), checkpoint(3))


def test_nothing_saved(tmp_path):
    assert store(tmp_path).load_newest() is None


def test_the_newest_are_kept_by_round_not_by_name(tmp_path):
    kept = store(tmp_path, keep=2)
    for round_ in (5, 999_999, 1_000_000, 1_000_001):
        kept.save(checkpoint(round_))
    assert [p.name for p in sorted(tmp_path.glob("*.safetensors"))] == [
        "checkpoint-1000000.safetensors",
        "checkpoint-1000001.safetensors",
    ]
    assert_same(kept.load_newest(), checkpoint(1_000_001))


def assert_damage_is_noticed(folder: Path, caplog) -> None:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert_same(store(folder).load_newest(), checkpoint(2))
    assert f"{path(folder, 3)} is damaged" in caplog.text


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_a_truncated_checkpoint_is_named_and_the_one_before_used(keep, tmp_path, caplog):
    filled(tmp_path)
    data = path(tmp_path, 3).read_bytes()
    path(tmp_path, 3).write_bytes(data[:keep])
    assert_damage_is_noticed(tmp_path, caplog)


def test_every_flipped_bit_is_noticed(tmp_path, caplog):
    """Over the whole file: length, header, metadata and data; a random bit of every byte."""
    filled(tmp_path)
    data = bytearray(path(tmp_path, 3).read_bytes())
    rng = np.random.default_rng(0)
    caplog.set_level(logging.CRITICAL, logger="flwr")
    kept = store(tmp_path)
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        path(tmp_path, 3).write_bytes(flipped)
        restored = kept.load_newest()
        # A space of the padding turned into a tab is still the same checkpoint, to the bit.
        assert_same(restored, checkpoint(2 if restored and restored.round_ == 2 else 3))
        assert restored is not None
        if restored.round_ == 3:
            assert chr(data[at]) == " "


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("write", [pickle.dumps, "torch"])
def test_a_pickle_is_never_loaded(write, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path)
    if write == "torch":
        torch.save({"model": Bomb()}, path(tmp_path, 3))
    else:
        path(tmp_path, 3).write_bytes(write(Bomb()))
    assert_damage_is_noticed(tmp_path, caplog)
    assert not Path("exploded").exists()


def test_somebody_elses_safetensors_are_not_ours(tmp_path, caplog):
    from safetensors.numpy import save_file

    filled(tmp_path)
    save_file({"weight": np.zeros(2, np.float32)}, path(tmp_path, 3))
    assert_damage_is_noticed(tmp_path, caplog)
    save_file({"w": np.zeros(2)}, path(tmp_path, 3), {"names": "5", "sha256": ""})
    assert_damage_is_noticed(tmp_path, caplog)


def test_all_damaged_is_as_if_there_were_none(tmp_path):
    filled(tmp_path)
    for round_ in (1, 2, 3):
        path(tmp_path, round_).write_bytes(b"")
    assert store(tmp_path).load_newest() is None


def test_a_crash_before_the_rename_leaves_the_old_one(tmp_path, monkeypatch):
    """As if the power went between write and rename: the temporary file stays behind."""
    kept = filled(tmp_path, 2)
    with monkeypatch.context() as crash:
        crash.setattr(Path, "replace", lambda self, target: os._exit(0))
        child = os.fork()
        if child == 0:
            kept.save(checkpoint(3))
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    (leftover,) = tmp_path.glob(".*.part")
    assert leftover.stat().st_size > 0
    again = store(tmp_path)
    assert_same(again.load_newest(), checkpoint(2))
    again.save(checkpoint(3))
    assert not list(tmp_path.glob(".*.part"))
    assert_same(again.load_newest(), checkpoint(3))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_while_writing_is_one_clear_line(call, tmp_path, monkeypatch):
    kept = filled(tmp_path, 2)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os if call == "fsync" else Path, call, full)
        with pytest.raises(CheckpointNotWritten) as caught:
            kept.save(checkpoint(3))
    text = str(caught.value)
    assert "No space left on device" in text
    assert str(path(tmp_path, 3)) in text
    assert "\n" not in text
    assert not list(tmp_path.glob(".*.part"))
    assert_same(store(tmp_path).load_newest(), checkpoint(2))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointNotWritten, match="cannot write"):
        store(tmp_path / "file" / "cell")


def test_another_configuration_is_refused_naming_the_key(tmp_path):
    filled(tmp_path)
    with pytest.raises(UserError, match=r"begun with train\.batch_size = 2, not 4"):
        store(tmp_path, config={**CONFIG, "train.batch_size": 4})
    with pytest.raises(UserError, match=r"begun with extra = None, not 1"):
        store(tmp_path, config={**CONFIG, "extra": 1})
    with pytest.raises(UserError, match=r"begun with seed = 0, not None"):
        store(tmp_path, config={k: v for k, v in CONFIG.items() if k != "seed"})


def test_a_checkpoint_of_another_run_is_refused_even_without_its_config(tmp_path):
    filled(tmp_path / "one")
    other = store(tmp_path / "two", config={**CONFIG, "seed": 1})
    shutil.copy(path(tmp_path / "one", 3), tmp_path / "two")
    with pytest.raises(UserError, match="begun with seed = 0, not 1"):
        other.load_newest()


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'"text"'])
def test_an_unreadable_config_is_refused(content, tmp_path):
    filled(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        store(tmp_path)


def test_the_config_is_written_once_and_readable(tmp_path):
    filled(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_other_versions_are_pointed_out(tmp_path, monkeypatch, caplog):
    filled(tmp_path)
    monkeypatch.setattr(module, "_VERSIONS", {**module._VERSIONS, "torch": "9.9"})
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert_same(store(tmp_path).load_newest(), checkpoint(3))
    assert f"written with torch {torch.__version__}, this is 9.9" in caplog.text


def test_the_hash_of_weights_is_as_documented():
    arrays = {"b": np.array([[1.0, 2.0]], np.float32), "a": np.array(3)}
    expected = hashlib.sha256()
    for name in ("a", "b"):
        value = arrays[name]
        expected.update(f"{name}\x1f{value.dtype.str}\x1f{value.shape}\x1f".encode())
        expected.update(value.tobytes("C"))
    assert weights_sha256(arrays) == expected.hexdigest()
    assert weights_sha256(dict(reversed(arrays.items()))) == expected.hexdigest()
    assert weights_sha256({**arrays, "a": np.array(3.0)}) != expected.hexdigest()
    assert weights_sha256({**arrays, "b": np.array([1.0, 2.0], np.float32)}) != expected.hexdigest()


DIGESTS = Fingerprint(*["0" * 64] * 3, (3, 0, 1), "1" * 64, "2" * 64)
DATA = DataSummary(("no", "yes"), (1, 2, 2), (0.1,), (1 / 3,), DIGESTS)


def test_the_data_come_back_and_others_are_refused(tmp_path):
    kept = store(tmp_path)
    kept.save(replace(checkpoint(1), data=DATA))
    restored = kept.load_newest(DATA)
    assert_same(restored, checkpoint(1))
    assert restored is not None
    assert restored.data == DATA
    renamed = replace(DATA, classes=("yes", "no"))
    with pytest.raises(UserError, match=r"the data changed since .*: class names \(no, yes; now"):
        kept.load_newest(renamed)
    # To be looked at, not to train on from there.
    assert kept.load_newest() is not None


def test_a_checkpoint_that_says_nothing_of_its_data_is_taken_and_said(tmp_path, caplog):
    kept = filled(tmp_path)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert_same(kept.load_newest(DATA), checkpoint(3))
    assert "says nothing of its data" in caplog.text


def test_other_data_written_into_a_checkpoint_are_noticed(tmp_path, caplog):
    kept = filled(tmp_path, 2)
    kept.save(replace(checkpoint(3), data=DATA))
    content = path(tmp_path, 3).read_bytes()
    for old, new in ((b'\\"yes\\"', b'\\"not\\"'), (b'"data":', b'"dada":')):
        assert content.count(old) == 1
        path(tmp_path, 3).write_bytes(content.replace(old, new))
        assert_damage_is_noticed(tmp_path, caplog)
