"""Workers die, are slow, and go; every client gets an answer, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import psutil
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from clients.local_state import Kept, Room
from fedkn.config import ExperimentConfig
from fedkn.direct import Asked, Trained
from fedkn.experiment import build_model, data_summary, federated_data
from fedkn.federation import (
    ARRAYS,
    CONFIG,
    LEARNING_RATE,
    METRICS,
    ROUND,
    RUN_TOKEN,
    STATE_ROUND,
    tensors_to_arrays,
)
from fedkn.stack import Flat, Layout
from server.run_data import DataChanged
from simulations.engines import crew as crew_module
from simulations.engines.crew import Crew
from simulations.engines.host import FIRST_NODE, Answer, Request
from simulations.engines.local_host import host_of
from simulations.engines.worker import WorkQueue
from tests.server.fake_grid import small


@pytest.fixture(params=["directly", "by messages"])
def requests(request: pytest.FixtureRequest, experiment: ExperimentConfig) -> list[list[Request]]:
    """Return requests of all clients, of each by itself."""
    return _requests(experiment, directly=request.param == "directly")


@pytest.fixture
def crew(
    experiment: ExperimentConfig,
    requests: list[list[Request]],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Crew]:
    """Return a crew of two, whose worker is up."""
    monkeypatch.setattr(crew_module, "PATIENCE", 0.0)
    crew = Crew(host_of(experiment, together=False), (experiment, False), 2)
    crew.answer(requests)
    _wait_until_up(crew)
    yield crew
    pids = [worker.pid for worker in crew._workers]
    crew.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def _requests(experiment: ExperimentConfig, *, directly: bool) -> list[list[Request]]:
    state = build_model(experiment).state_dict()
    told = {ROUND: 1, LEARNING_RATE: 0.01, RUN_TOKEN: "0123456789abcdef", STATE_ROUND: 0}
    content: Asked | RecordDict
    if directly:
        sent = Flat.of(Layout(state), state)
        assert sent is not None
        content = Asked(told, data_summary(experiment), sent)
    else:
        content = RecordDict({ARRAYS: tensors_to_arrays(state), CONFIG: ConfigRecord({**told})})
    nodes = range(FIRST_NODE, FIRST_NODE + experiment.partition.clients)
    return [[Request(node, "train", content, Kept(Room()))] for node in nodes]


def _wait_until_up(crew: Crew) -> None:
    while not all(worker.ready for worker in crew._workers):
        crew._collect(0.1)


def _partition(answer: Answer) -> object:
    assert answer.content is not None, answer.error
    if isinstance(answer.content, Trained):
        return answer.content.metrics["partition-id"]
    assert isinstance(answer.content, RecordDict)
    return answer.content.metric_records[METRICS]["partition-id"]


def _fails_beside(
    crew: Crew,
    requests: list[list[Request]],
    monkeypatch: pytest.MonkeyPatch,
    timeout: float | None = None,
) -> list[str]:
    """Return the errors of a wave whose last client was taken by a worker that never answers.

    The worker is stopped, and its client taken from the queue as if by it.
    """
    (worker,) = crew._workers
    os.kill(worker.pid, signal.SIGSTOP)
    fill = crew._queue.fill
    monkeypatch.setattr(crew._queue, "fill", lambda wave, groups: fill(wave, groups - 1))
    answers = [answer for (answer,) in crew.answer(requests, timeout)]
    monkeypatch.undo()
    monkeypatch.setattr(crew_module, "PATIENCE", 0.0)
    assert [_partition(a) for a in answers[:-1]] == list(range(len(answers) - 1))
    return [answer.error for answer in answers if answer.error]


def test_answers_come_in_the_order_of_the_requests(
    crew: Crew, requests: list[list[Request]]
) -> None:
    answers = crew.answer(requests)
    assert [_partition(a) for (a,) in answers] == list(range(len(requests)))


@pytest.mark.parametrize("at_a_time", [2, WorkQueue.CAPACITY])
def test_updates_are_the_same_whoever_made_them_until_the_next_are_asked_for(
    at_a_time: int, experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkQueue, "CAPACITY", at_a_time)
    requests = _requests(experiment, directly=True)
    monkeypatch.setattr(crew_module, "PATIENCE", 0.0)
    crew = Crew(host_of(experiment, together=False), (experiment, False), 2)
    alone = Crew(host_of(experiment, together=False), (experiment, False), 1)
    try:
        expected = [_tensors(answer) for (answer,) in alone.answer(requests)]
        crew.answer(requests)
        _wait_until_up(crew)
        for _ in range(3):
            # All of them by the worker: this process finds none left to take.
            monkeypatch.setattr(crew._queue, "take", lambda wave: None)
            assert crew._workers[0].ready
            found = [_tensors(answer) for (answer,) in crew.answer(requests)]
            for one, other in zip(found, expected, strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one)
    finally:
        alone.close()
        crew.close()


def _tensors(answer: Answer) -> dict[str, torch.Tensor]:
    assert isinstance(answer.content, Trained), answer.error
    assert isinstance(answer.content.tensors, Flat)
    return answer.content.tensors.tensors()


def test_a_dead_worker_costs_its_client_and_is_replaced(
    crew: Crew, requests: list[list[Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (worker,) = crew._workers
    program = f"import os, time; time.sleep(2); os.kill({worker.pid}, 9)"
    with subprocess.Popen([sys.executable, "-c", program]):
        (error,) = _fails_beside(crew, requests, monkeypatch)
    assert "SIGKILL" in error
    (successor,) = crew._workers
    assert successor.pid != worker.pid
    _wait_until_up(crew)
    test_answers_come_in_the_order_of_the_requests(crew, requests)


def test_a_worker_slower_than_the_round_timeout_is_ended(
    crew: Crew, requests: list[list[Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (error,) = _fails_beside(crew, requests, monkeypatch, timeout=1.0)
    assert "round_timeout" in error
    test_answers_come_in_the_order_of_the_requests(crew, requests)


def test_workers_end_with_their_parent() -> None:
    program = (
        "import sys, time; from fedkn.config import ExperimentConfig as E;"
        "from simulations.engines.worker import WorkerProcess, WorkQueue;"
        "w = WorkerProcess((E.resolve({}), False), WorkQueue(), 1, '');"
        "print(w.pid, flush=True); w.socket.recv(1); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert not psutil.wait_procs([worker], timeout=120)[1]


def test_a_worker_that_finds_other_data_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads them anew: what it trains would depend on which clients it happens to take."""
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    root = tmp_path / "a.npz"
    np.savez(root, images=images, labels=np.arange(60) % 3)
    experiment = small(data__source="arrays", data__root=str(root), partition__minimum=2)
    federated_data(experiment)
    np.savez(root, images=images, labels=np.arange(60) // 20)
    monkeypatch.setattr(crew_module, "PATIENCE", 0.0)
    crew = Crew(host_of(experiment, together=False), (experiment, False), 2)
    try:
        with pytest.raises(DataChanged, match="this run was begun: labels"):
            _answer_for_ever(crew, experiment)
    finally:
        crew.close()


def _answer_for_ever(crew: Crew, experiment: ExperimentConfig) -> NoReturn:
    while True:
        crew.answer(_requests(experiment, directly=False))
