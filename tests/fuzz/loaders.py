"""What every loader does with a file that was changed at random.

A loader may return what it makes of it, or raise the errors that a user is told in one line.
"""

from __future__ import annotations

import io
import json
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Context, RecordDict

from clients.device.settings import read_device
from clients.local_state import local_state
from fedkn.config import ExperimentConfig
from fedkn.data.arrays import load_arrays
from fedkn.data.decoded import Decoded, load_decoded
from fedkn.errors import FedknError
from fedkn.models import build
from fedkn.models.published import load_published_weights
from fedkn.normalizers import create
from fedkn.tables import read_toml
from server.checkpoints import Checkpoint, CheckpointStore
from server.deployment.device_config import device_toml
from server.deployment.fleet import Fleet
from server.metrics_log import MetricsLog
from server.rounds.identities import read_identities, write_identities
from server.rounds.participation import begin
from simulations.runs.folder import RunFolder
from simulations.runs.records import GridRecord
from tests.fedkn.models.test_published import authors_name
from tests.fuzz.mutation import NUMBERS, TEXTS, mutated, mutated_bytes, mutated_json

__all__ = ["LOADERS"]

Case = Callable[[random.Random], str]


def _told(load: Callable[[random.Random], object]) -> Case:
    """Return the case of `load`: what it raises must be an error that the user is told."""

    @wraps(load)
    def case(rng: random.Random) -> str:
        told = ""
        try:
            load(rng)
        except FedknError as error:
            told = str(error)
        assert len(told) < 20_000, len(told)
        return "told" if told else "loaded"

    return case


@lru_cache(maxsize=1)
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fedkn-fuzz-")


def _folder(name: str) -> Path:
    folder = Path(_kept().name) / name
    folder.mkdir(exist_ok=True)
    return folder


@cache
def _honest(name: str) -> bytes:
    """Return the content of the file of a loader as it was written."""
    return _WRITERS[name]().read_bytes()


def _changed(rng: random.Random, name: str) -> Path:
    """Write the file of a loader, changed, where it was, and return its path."""
    content = _honest(name)
    path = _PLACES[name]
    path.write_bytes(mutated_bytes(rng, content))
    return path


def _arrays() -> dict[str, np.ndarray]:
    return {"w": np.arange(6, dtype=np.float32), "n": np.array(3, np.int64)}


def _store() -> CheckpointStore:
    return CheckpointStore(_folder("checkpoint"), 2, {"seed": 0})


def _write_checkpoint() -> Path:
    _store().save(Checkpoint(1, _arrays(), {"m_t": _arrays()["w"]}, begin(3)))
    return _place("checkpoint", _folder("checkpoint") / "checkpoint-000001.safetensors")


@_told
def checkpoint(rng: random.Random) -> object:
    _changed(rng, "checkpoint")
    return _store().load_newest()


def _state() -> Any:
    context = Context(
        run_id=1,
        node_id=1,
        node_config={"state-folder": str(_folder("state"))},
        state=RecordDict(),
        run_config={},
    )
    return local_state(context, 0, "0123456789abcdef")


def _write_state() -> Path:
    _state().keep(1, {"w": torch.arange(6.0)}, horizon=3)
    (path,) = _folder("state").rglob("round-*")
    return _place("state", path)


@_told
def client_state(rng: random.Random) -> object:
    _changed(rng, "state")
    return _state().restore(1)


@lru_cache(maxsize=1)
def _network() -> torch.nn.Module:
    return build("knresnet18", num_classes=3, in_channels=3, normalizer=create("kernel"), width=4)


def _published() -> dict[str, torch.Tensor]:
    """Return weights for `_network` under the authors' names."""
    state = _network().state_dict()
    return {authors_name(name, 18): torch.zeros_like(value) for name, value in state.items()}


def _write_weights() -> Path:
    path = _folder("weights") / "published.pth"
    torch.save({"model": _published()}, path)
    return _place("weights", path)


@_told
def published_weights(rng: random.Random) -> object:
    path = _changed(rng, "weights")
    if rng.random() < 0.6:
        weights: dict[Any, Any] = dict(_published())
        _change_entry(rng, weights, _other_tensor)
        with _deep_values():
            torch.save(rng.choice(({"model": weights}, weights)), path)
    load_published_weights(_network(), path)
    return path


@contextmanager
def _deep_values() -> Iterator[None]:
    """Let what is nested too deep for Python's usual stack be written; it is not read so."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def _other_tensor(rng: random.Random, tensor: torch.Tensor) -> object:
    others: list[Callable[[], object]] = [
        lambda: tensor * rng.choice([n for n in NUMBERS if isinstance(n, float)]),
        lambda: tensor.to(rng.choice((torch.float16, torch.int64, torch.complex64, torch.bool))),
        lambda: tensor[..., :0],
        lambda: tensor.reshape(-1),
        tensor.to_sparse,
        lambda: torch.empty(tensor.shape, device="meta"),
        lambda: mutated(rng, 1.0),
    ]
    return rng.choice(others)()


def _change_entry(
    rng: random.Random, entries: dict[Any, Any], other: Callable[[random.Random, Any], object]
) -> None:
    """Remove, rename, double or change one of `entries`."""
    key = rng.choice(list(entries))
    match rng.randrange(6):
        case 0:
            del entries[key]
        case 1:
            entries[rng.choice((*TEXTS[:-1], *(7, ())))] = entries.pop(key)
        case 2:
            entries[f"{key}{rng.choice(TEXTS[:-1])}"] = entries[key]
        case _:
            entries[key] = other(rng, entries[key])


def _write_run() -> Path:
    folder = _folder("run")
    record = GridRecord("x", "fedkn", ["group"], [2], ["iid"], [0], [0.1], {}, {})
    run = RunFolder.create(folder / "r", record)
    log = MetricsLog(run.path, "cell")
    log.write(
        "start", purpose="result", config=ExperimentConfig().flat(), parameters=9, tensors=2,
        local_tensors=0, time=1.0,
    )  # fmt: skip
    log.write(
        "round", round=1, seconds=1.0, cohort=[0, 1], updates=1, examples=4, steps=2,
        skipped_batches=0, skipped_examples=0, refused=[{"client": 1, "reason": "x"}], failed=[],
        late=[], state_lost=[], epsilon={}, batch_sizes={}, train_loss=1.0, bytes_down=1,
        bytes_up=1, train_seconds=1.0, learning_rate=0.1,
    )  # fmt: skip
    log.write("evaluation", round=1, split="test", metrics={"accuracy": 0.5}, loss=1.0, examples=10)
    log.write(
        "client_evaluation", round=1, split="test", mean=0.5, worst_tenth=0.5, deviation=0.0,
        loss=1.0, clients=[{"client": 0, "examples": 2, "value": 0.5, "loss": 1.0}], failed=[],
    )  # fmt: skip
    log.write("end", status="completed", seconds=1.0, weights_sha256="ab")
    return _place("run", run.metrics_path)


@_told
def run_metrics(rng: random.Random) -> object:
    path = _changed(rng, "run")
    if rng.random() < 0.8:
        lines = [json.loads(line) for line in _honest("run").splitlines()]
        at = rng.randrange(len(lines))
        lines[at] = mutated_json(rng, lines[at])
        texts = [_text(line) for line in lines]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return RunFolder.open(path.parent).cells()


@_told
def run_record(rng: random.Random) -> object:
    _honest("run")
    path = _PLACES["run"].with_name("experiment.json")
    honest = json.loads(_experiment_text())
    changed = mutated_json(rng, honest)
    path.write_text(_text(changed), encoding="utf-8")
    try:
        return RunFolder.open(path.parent).grid
    finally:
        path.write_text(_experiment_text(), encoding="utf-8")


@lru_cache(maxsize=1)
def _experiment_text() -> str:
    return _PLACES["run"].with_name("experiment.json").read_text(encoding="utf-8")


def _write_npz() -> Path:
    path = _folder("npz") / "images.npz"
    np.savez(path, **_images())
    return _place("npz", path)


def _images() -> dict[str, Any]:
    images = np.arange(8 * 3 * 5 * 5, dtype=np.uint8).reshape(8, 5, 5, 3)
    labels = np.arange(8, dtype=np.int64) % 2
    classes = np.array(["a", "b"])
    return {
        **{"images": images, "labels": labels, "classes": classes},
        **{"test_images": images, "test_labels": labels},
    }


@_told
def npz(rng: random.Random) -> object:
    path = _changed(rng, "npz")
    if rng.random() < 0.6:
        arrays = _images()
        _change_entry(rng, arrays, _other_array)
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in arrays.items():
                stream = io.BytesIO()
                np.save(stream, array, allow_pickle=True)
                content = stream.getvalue()
                if rng.random() < 0.1:
                    content = mutated_bytes(rng, content)
                member = zipfile.ZipInfo()
                # Set so, it is not cut at a NUL before it is written.
                member.filename = f"{str(name).encode('utf-8', 'replace').decode()}.npy"
                archive.writestr(member, content)
    return load_arrays(path)


def _other_array(rng: random.Random, array: np.ndarray) -> Any:
    others: list[Callable[[], object]] = [
        lambda: array[:0],
        lambda: array[: rng.randrange(len(array))],
        lambda: array.reshape(-1),
        lambda: array[..., None],
        lambda: np.array(rng.choice(NUMBERS)),
        lambda: np.array(rng.choice(TEXTS).encode("utf-8", "replace").decode()),
        lambda: np.array([rng.choice(TEXTS).encode("utf-8", "replace").decode()] * len(array)),
        lambda: array.astype(rng.choice(("f4", "f8", "i8", "u1", "c8", "?", "O", "S3", "U3"))),
        lambda: np.full(array.shape, rng.choice([n for n in NUMBERS if isinstance(n, float)])),
        lambda: np.zeros(array.shape, [("x", "i4"), ("y", "f4")]),
        lambda: np.zeros(array.shape, "datetime64[s]"),
        lambda: np.full(array.shape, rng.choice((-1, 2, 10**12, 2**63 - 1)), np.int64),
    ]
    with np.errstate(all="ignore"):
        try:
            return rng.choice(others)()
        except (TypeError, ValueError, OverflowError):
            return np.array([None])


def _write_numbers() -> Path:
    path = _folder("numbers") / "numbers.npz"
    inputs = np.linspace(-1, 1, 12 * 2 * 5).astype(np.float32).reshape(12, 2, 5)
    stream = io.BytesIO()
    np.savez(
        stream, inputs=inputs, targets=inputs[:, 0, :2].astype(np.float64),
        test_inputs=inputs, test_targets=inputs[:, 0, :2], clients=np.arange(12) % 3,
    )  # fmt: skip
    path.write_bytes(stream.getvalue())
    return _place("numbers", path)


@_told
def numbers(rng: random.Random) -> object:
    source = load_arrays(_changed(rng, "numbers"))
    for data in (source.train, source.test):
        assert bool(data.inputs.double().isfinite().all()), "NaN is trained on"
        assert bool(data.targets.isfinite().all()), "NaN is trained on"
        assert data.inputs.ndim <= 5
    return source


def _decoded() -> Decoded:
    images = np.arange(4 * 3 * 4 * 4, dtype=np.uint8).reshape(4, 3, 4, 4)
    return Decoded((4, 3, 4, 4), [images])


def _write_cache() -> Path:
    root = _folder("images")
    load_decoded(root, "raw", "key", _decoded)
    (path,) = (one for one in root.rglob("raw-*.npy"))
    return _place("cache", path)


@_told
def image_cache(rng: random.Random) -> object:
    _changed(rng, "cache")
    images = load_decoded(_folder("images"), "raw", "key", _decoded).images
    assert images.dtype == torch.uint8, "pixels of another dtype are trained on"
    assert tuple(images.shape) == (4, 3, 4, 4), "images of another shape are trained on"
    return images


@_told
def configuration(rng: random.Random) -> object:
    flat = dict(ExperimentConfig().flat())
    if rng.random() < 0.5:
        key = rng.choice(list(flat))
        return ExperimentConfig.resolve(flat | {key: mutated_json(rng, flat[key])})
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in flat.items())
    path = _folder("toml") / "x.toml"
    path.write_bytes(mutated_bytes(rng, text.encode()))
    return ExperimentConfig.resolve(read_toml(path))


def _fleet() -> Fleet:
    folder = _folder("fleet")
    return Fleet(folder, 3, "localhost", 8443, superlink_port=8444)


def _write_fleet() -> Path:
    _fleet().write()
    return _place("fleet", _folder("fleet") / "fleet.toml")


@_told
def fleet_file(rng: random.Random) -> object:
    return Fleet.open(_changed(rng, "fleet").parent).devices[:3]


def _write_device() -> Path:
    fleet = _fleet()
    path = _folder("device") / "device.toml"
    fleet.signing_key.parent.mkdir(exist_ok=True)
    # Not one that is drawn: a case is a function of its seed.
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    fleet.signing_key.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    path.write_text(device_toml(fleet, fleet.devices[1]), encoding="utf-8")
    return _place("device", path)


@_told
def device_file(rng: random.Random) -> object:
    return read_device(_changed(rng, "device")).node_config()


def _write_keys() -> Path:
    folder = _folder("keys")
    write_identities(folder, {0: b"a", 1: b"b"})
    return _place("keys", folder / "devices.json")


@_told
def device_keys(rng: random.Random) -> object:
    return read_identities(str(_changed(rng, "keys").parent))


def _text(value: object) -> str:
    try:
        return json.dumps(value)
    except (RecursionError, ValueError):
        return "[" * 5000


_PLACES: dict[str, Path] = {}


def _place(name: str, path: Path) -> Path:
    _PLACES[name] = path
    return path


_WRITERS: dict[str, Callable[[], Path]] = {
    "checkpoint": _write_checkpoint,
    "state": _write_state,
    "weights": _write_weights,
    "run": _write_run,
    "npz": _write_npz,
    "numbers": _write_numbers,
    "cache": _write_cache,
    "fleet": _write_fleet,
    "device": _write_device,
    "keys": _write_keys,
}

LOADERS: dict[str, Case] = {
    "checkpoint": checkpoint,
    "client-state": client_state,
    "published-weights": published_weights,
    "run-metrics": run_metrics,
    "run-record": run_record,
    "npz": npz,
    "npz-numbers": numbers,
    "image-cache": image_cache,
    "configuration": configuration,
    "fleet-file": fleet_file,
    "device-file": device_file,
    "device-keys": device_keys,
}
