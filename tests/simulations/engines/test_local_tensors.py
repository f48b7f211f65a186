"""Tensors that stay on clients: kept between rounds, through a kill, whatever the engine."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients import local_state
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from server import run as server_run
from server.rounds.loop import run_round
from simulations.engines import crew, host
from simulations.engines.run import run_experiment
from tests.server.fake_grid import small

# Two of six clients a round, so that a client's last round is not the one before.
COMMON: dict[str, Any] = {
    "rounds": 5,
    "cohort": 2,
    "engine": "inprocess",
    "workers": 1,
    "evaluation.client_fraction": 0.3,
    "train.batch_size": 4,
}


def config(folder: Path | None = None, **changes: Any) -> ExperimentConfig:
    given = {key.replace("__", "."): value for key, value in changes.items()}
    place = {"checkpoint.folder": str(folder)} if folder else {}
    return ExperimentConfig.resolve(small().flat(), COMMON, place, given)


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    every = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in every if line["kind"] == kind]


def own_models(folder: Path) -> list[dict[str, Any]]:
    (line,) = lines(folder, "client_evaluation")
    assert not line["failed"]
    return line["clients"]


class Killed(BaseException):
    pass


def kill_after(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """End the server when the clients have answered in round `last`, before anything is saved."""

    def run(round_: int, *args: Any, **kwargs: Any) -> Any:
        result = run_round(round_, *args, **kwargs)
        if round_ == last:
            raise Killed
        return result

    monkeypatch.setattr(server_run, "run_round", run)


VARIANTS = [
    {"normalizer__name": "fedbn"},
    {"normalizer__name": "silobn"},
    {"normalizer__name": "hbn"},
    {"train__keep_momentum": True, "train__momentum": 0.9},
    {"strategy__name": "scaffold"},
]


PERSONAL = [{"strategy__name": name} for name in ("fedper", "fedrep", "ditto", "apfl")]


@pytest.mark.parametrize("changes", VARIANTS + PERSONAL, ids=lambda c: str(next(iter(c.values()))))
def test_killed_and_resumed_is_as_if_nothing_had_been(changes, tmp_path, monkeypatch):
    whole = run_experiment(config(tmp_path / "whole", **changes))
    interrupted = config(tmp_path / "killed", **changes)
    kill_after(monkeypatch, 4)
    with pytest.raises(Killed):
        run_experiment(interrupted)
    monkeypatch.undo()
    resumed = run_experiment(interrupted)
    assert [line["round"] for line in lines(tmp_path / "killed", "resume")] == [3]
    assert resumed.weights_sha256 == whole.weights_sha256
    assert own_models(tmp_path / "killed") == own_models(tmp_path / "whole")


@pytest.mark.parametrize("changes", VARIANTS[1:], ids=lambda c: str(next(iter(c.values()))))
def test_what_is_kept_counts(changes):
    kept = run_experiment(config(**changes)).weights_sha256
    forgotten = {
        "train.keep_momentum": False,
        "strategy.name": "fedavg",
        "normalizer.name": "fedbn",
    }
    key = next(iter(changes)).replace("__", ".")
    other = {**changes, key.replace(".", "__"): forgotten[key]}
    assert kept != run_experiment(config(**other)).weights_sha256


def test_in_memory_and_on_disk_are_the_same(tmp_path):
    with_folder = run_experiment(config(tmp_path / "run", normalizer__name="hbn"))
    assert run_experiment(config(normalizer__name="hbn")).weights_sha256 == (
        with_folder.weights_sha256
    )


def test_the_disk_is_waited_for_once_a_round(tmp_path, monkeypatch):
    """Not for every client: a state outlives a power cut before the checkpoint that asks for it."""
    durable, written = [], []
    write = local_state.write_atomically

    def writing(path: Path, content: bytes, **options: Any) -> None:
        written.append((path, options["durable"]))
        write(path, content, **options)

    monkeypatch.setattr(local_state, "write_atomically", writing)
    monkeypatch.setattr(host, "make_durable", lambda folder: durable.append(len(written)))
    run_experiment(config(tmp_path / "run", normalizer__name="fedbn"))
    assert len(written) == 10
    assert not any(waits for _, waits in written)
    assert durable == [2, 4, 6, 8, 10]


def test_a_disk_that_fails_then_ends_the_run_and_is_named(tmp_path, monkeypatch):
    def failing(folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

    monkeypatch.setattr(host, "make_durable", failing)
    with pytest.raises(UserError, match=r"cannot write in '.*clients': Input/output error"):
        run_experiment(config(tmp_path / "run", normalizer__name="fedbn"))


def test_workers_find_the_state_that_others_left(tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "PATIENCE", 0.0)
    one = run_experiment(config(tmp_path / "one", normalizer__name="hbn"))
    several = run_experiment(config(tmp_path / "several", normalizer__name="hbn", workers=2))
    assert one.weights_sha256 == several.weights_sha256
    assert own_models(tmp_path / "one") == own_models(tmp_path / "several")


def test_a_client_that_lost_its_state_starts_anew_and_the_log_says_so(tmp_path, monkeypatch):
    given = config(tmp_path / "run", normalizer__name="hbn", cohort=6)
    kill_after(monkeypatch, 4)
    with pytest.raises(Killed):
        run_experiment(given)
    monkeypatch.undo()
    (lost,) = (tmp_path / "run").rglob("client-2")
    shutil.rmtree(lost)
    run_experiment(given)
    assert [line["state_lost"] for line in lines(tmp_path / "run", "round")[-2:]] == [[2], []]


def test_every_client_evaluates_its_own_images(tmp_path):
    run_experiment(config(tmp_path / "run", normalizer__name="group"))
    clients = own_models(tmp_path / "run")
    assert [entry["client"] for entry in clients] == list(range(6))
    assert all(0 <= entry["value"] <= 1 and entry["examples"] > 0 for entry in clients)


def test_tensors_that_stay_need_images_to_evaluate_them_on():
    with pytest.raises(UserError, match=r"evaluation\.client_fraction"):
        run_experiment(config(normalizer__name="fedbn", evaluation__client_fraction=0.0))


@pytest.mark.parametrize("changes", PERSONAL, ids=lambda c: str(next(iter(c.values()))))
def test_clients_are_judged_by_their_own_models(changes, tmp_path):
    own, plain = tmp_path / "own", tmp_path / "plain"
    run_experiment(config(own, cohort=6, **changes))
    run_experiment(config(plain, cohort=6, **{**changes, "strategy__name": "fedavg"}))
    assert own_models(own) != own_models(plain)
    (start,) = lines(own, "start")
    assert start["local_tensors"] == (2 if "fed" in changes["strategy__name"] else start["tensors"])


def test_fedpers_clients_train_stacked_to_the_same_models(tmp_path):
    # With seed 0 rounding decides which of two equal pixels a pooling takes.
    settings = {"strategy__name": "fedper", "cohort": 4, "seed": 1}
    one = run_experiment(config(tmp_path / "one", **settings))
    together = run_experiment(config(tmp_path / "together", engine="batched", **settings))
    for name, value in one.arrays.items():
        assert np.allclose(value.numpy(), together.arrays[name].numpy(), rtol=1e-3, atol=1e-5)
    for alone, stacked in zip(
        own_models(tmp_path / "one"), own_models(tmp_path / "together"), strict=True
    ):
        assert alone["loss"] == pytest.approx(stacked["loss"], rel=1e-3)
