"""Observers are told what the log is told, change nothing, and fail for themselves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.observer import Observer
from server.observers import check_observers
from server.observers.registry import TRACKERS
from server.observers.untouched import untouched
from server.rounds.loop import NoValidUpdates
from tests.server.fake_grid import run, small

HERE = "tests.server.observers.watchers"


def watched(*names: str, **changes: Any) -> ExperimentConfig:
    return small(observers__names=",".join(f"{HERE}:{name}" for name in names), **changes)


def log_of(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] in kinds]


def told(file: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, file.read_text().splitlines()))


def test_an_observer_is_told_what_the_log_is_told(tmp_path):
    options = json.dumps({"to": str(tmp_path / "told.jsonl"), "mark": "7"})
    folder = tmp_path / "run"
    config = watched("Lines", checkpoint__folder=str(folder), observers__options=options)
    outcome = run(config)
    calls = told(tmp_path / "told.jsonl")
    kinds = ("start", "round", "evaluation", "client_evaluation", "end")
    lines = log_of(folder, *kinds)
    for call, line in zip(calls, lines, strict=False):
        assert {"cell": call["cell"], "kind": call["kind"], **call["fields"]} == line
        with_tensors = call["kind"] in ("round", "evaluation")
        assert call["tensors"] == (sorted(outcome.tensors) if with_tensors else [])
        assert call["mark"] == "7"
    assert len(calls) == len(lines) + 1
    assert [call["call"] for call in (calls[0], *calls[-2:])] == [
        "run_begins",
        "cell_ends",
        "run_ends",
    ]


def test_no_observer_changes_a_bit(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    alone = run(small(checkpoint__folder=str(tmp_path / "alone")))
    random.seed(5)
    watched_run = run(watched("Meddler", checkpoint__folder=str(tmp_path / "watched")))
    after = random.random()
    assert watched_run.weights_sha256 == alone.weights_sha256
    assert watched_run.evaluation == alone.evaluation

    def comparable(folder: Path) -> list[dict[str, Any]]:
        lines = log_of(folder, "round", "evaluation", "warning")
        clock = ("seconds", "train_seconds", "waiting_seconds")
        return [{k: v for k, v in line.items() if k not in clock} for line in lines]

    assert comparable(tmp_path / "watched") == comparable(tmp_path / "alone")
    random.seed(5)
    assert after == random.random()
    assert Path.cwd() == tmp_path


def test_global_state_is_put_back(tmp_path, monkeypatch):
    from tests.server.observers.watchers import Meddler, Unmade

    monkeypatch.chdir(tmp_path)

    def state() -> list[Any]:
        return [
            *(random.getstate(), np.random.get_state()[1].tolist(), np.geterr()),  # noqa: NPY002
            *(torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_default_dtype()),
            *(torch.get_num_threads(), torch.get_float32_matmul_precision(), Path.cwd()),
            *(torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled),
            torch.backends.cudnn.benchmark,
        ]

    before = state()
    with untouched():
        Meddler()
        assert state()[3:] != before[3:]
    assert state() == before
    with pytest.raises(ConnectionError), untouched():
        Unmade()
    assert state() == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FailsLate", "failed in round_ends (RuntimeError: the disk of"),
        ("Exits", "failed in evaluation (SystemExit: 3)"),
    ],
)
def test_one_that_fails_is_a_warning_once_and_the_run_goes_on(name, said, tmp_path, caplog):
    folder = tmp_path / "run"
    options = json.dumps({"to": str(tmp_path / "told.jsonl")})
    config = watched(
        name, "Lines", checkpoint__folder=str(folder), observers__options=options, rounds=3
    )
    assert run(config).weights_sha256 == run(small(rounds=3)).weights_sha256
    (warning,) = log_of(folder, "warning")
    assert said in warning["text"]
    assert f"{HERE}:{name}" in warning["text"]
    assert "\x1b" not in warning["text"]
    assert sum(said in record.getMessage() for record in caplog.records) == 1
    # The others are told all the same.
    assert [call["kind"] for call in told(tmp_path / "told.jsonl")].count("round") == 3


def test_one_that_cannot_be_made_is_a_warning(caplog):
    assert run(watched("Unmade")).weights_sha256 == run(small()).weights_sha256
    assert sum("nobody answers" in record.getMessage() for record in caplog.records) == 1


def test_run_ends_also_where_the_run_fails(tmp_path):
    to = tmp_path / "told.jsonl"
    options = json.dumps({"to": str(to)})
    patience = {"server__max_failed_rounds": 1, "server__round_timeout": 0.5}
    with pytest.raises(NoValidUpdates):
        run(watched("Lines", observers__options=options, **patience), lambda *_: [])
    assert [call["call"] for call in told(to)][-1] == "run_ends"
    assert [call["fields"].get("status") for call in told(to)][-2] == "failed"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"observers.names": "tensorbord"}, "did you mean 'tensorboard'"),
        ({"observers.names": f"{HERE}:Nothing"}, "Nothing"),
        ({"observers.names": f"{HERE}:NoObserver"}, "round_ends"),
        ({"observers.names": f"{HERE}:Lines", "observers.options.too": 1}, "did you mean 'to'"),
        ({"observers.options.to": "x"}, "no observers.names"),
        ({"observers.names": "os:sep"}, "no class"),
    ],
)
def test_what_cannot_observe_is_refused_in_one_line(settings, said):
    with pytest.raises(UserError, match=said) as refused:
        check_observers(ExperimentConfig.resolve(settings))
    assert "\n" not in str(refused.value)


def test_a_tracker_that_is_not_installed_names_its_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, TRACKERS["tensorboard"].partition(":")[0], raising=False)
    with pytest.raises(UserError, match=r"fedkn\[tensorboard\]"):
        check_observers(ExperimentConfig.resolve({"observers.names": "tensorboard"}))


def test_an_option_goes_to_those_that_take_it():
    names = f"{HERE}:Lines, tensorboard,{HERE}:Meddler"
    config = ExperimentConfig.resolve({"observers": {"names": names, "options": {"to": "x"}}})
    assert config.observers.names == f"{HERE}:Lines,tensorboard,{HERE}:Meddler"
    check_observers(config)
    as_list = ExperimentConfig.resolve({"observers": {"names": names.split(",")}})
    assert as_list.observers.names == config.observers.names


def test_an_observer_of_no_calls_hears_nothing():
    assert all(getattr(Observer(), name)(None) is None for name in vars(Observer) if name[0] != "_")
