"""Clients of this machine, asked and answering without messages: as if there had been some."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from clients.app import train_directly
from clients.local_state import Kept, Room
from clients.trainer import SequentialTrainer, alone
from fedkn.config import ExperimentConfig
from fedkn.direct import Asked, Trained
from fedkn.stack import Flat, Layout
from server.run import Outcome, run_server
from server.strategies import robust
from server.strategies.registry import names
from server.wire import DirectGrid, Order
from tests.server.fake_grid import FakeGrid, run, small

# Whose server half is FedAvg's, and whose clients keep models of their own.
PERSONAL = ("fedper", "fedrep", "ditto", "apfl")

Tamper = Callable[[int, int, Trained], Trained | str]


class DirectFake(FakeGrid, DirectGrid):
    """The real ClientApp's training without messages, whose answers pass through `tamper`."""

    def __init__(self, config: ExperimentConfig, tamper: Tamper | None = None) -> None:
        super().__init__(config)
        self.change = tamper
        room = Room()
        for context in self._contexts.values():
            context.state = Kept(room)  # as an engine's clients have it

    def train(self, order: Order, timeout: float | None) -> Mapping[int, Trained | str]:
        sent = Flat.sent(Layout(order.tensors, order.parameters), order.tensors)
        control = Flat.sent(Layout(order.control), order.control) if order.control else None
        answers: dict[int, Trained | str] = {}
        for partition, node in order.nodes.items():
            told = {**order.told, **order.own[partition]}
            try:
                asked = Asked(told, order.data, sent, control)
                answer: Trained | str = alone(train_directly(asked, self._contexts[node]))
            except Exception as error:
                answer = f"Traceback …\n{error}"
            if self.change and isinstance(answer, Trained):
                answer = self.change(told["server-round"], partition, answer)
            answers[partition] = answer
        return answers


def directly(config: ExperimentConfig, tamper: Tamper | None = None) -> Outcome:
    return run_server(DirectFake(config, tamper), config)


CLOCKS = ("seconds", "train_seconds", "waiting_seconds", "time")


def lines_of(folder: Path) -> list[dict]:
    """Return the log's lines without what a clock says, or where the run was."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in line.items() if k not in (*CLOCKS, "config")}
        for line in lines
        if line["kind"] != "memory"
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer__name": "kernel", "strategy__name": "scaffold"},
        {"normalizer__name": "batch", "strategy__name": "fedadam"},
        {"normalizer__name": "hbn", "evaluation__client_fraction": 0.2},
        {"normalizer__name": "fedbn", "evaluation__client_fraction": 0.2},
        {"strategy__name": "ditto", "evaluation__client_fraction": 0.2},
        {"strategy__name": "krum", "cohort": 5},
        {"strategy__name": "multikrum", "cohort": 5, "strategy__malicious_clients": 1},
        {"strategy__name": "fedtrimmedavg", "cohort": 5},
        {"strategy__name": "bulyan", "cohort": 4},
        {"strategy__name": "qfedavg"},
        {"strategy__name": "fedavgm"},
        {"strategy__name": "fedmedian", "train__keep_momentum": True, "train__momentum": 0.9},
        {"privacy__mechanism": "server_fixed", "privacy__noise_multiplier": 0.1},
        {"privacy__mechanism": "server_adaptive", "privacy__noise_multiplier": 0.1},
        {"privacy__mechanism": "client_fixed", "privacy__noise_multiplier": 0.1},
        {"privacy__mechanism": "client_adaptive", "privacy__noise_multiplier": 0.1},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_weights_and_log_are_those_of_messages(changes, tmp_path):
    config = small(train__local_steps=2, **changes)
    ends = []
    for name, way in (("messages", run), ("directly", directly)):
        ends.append(way(config.overlay(checkpoint__folder=str(tmp_path / name))).weights_sha256)
    assert ends[0] == ends[1]
    assert lines_of(tmp_path / "messages") == lines_of(tmp_path / "directly")


def tensors(answer: Trained) -> dict[str, Tensor]:
    assert isinstance(answer.tensors, Flat)
    return answer.tensors.tensors()


def put(answer: Trained, changed: Mapping[str, Tensor]) -> Trained:
    assert isinstance(answer.tensors, Flat)
    return Trained(answer.metrics, Flat.of(answer.tensors.layout, changed) or changed)


def with_all(change: Callable[[Tensor], Tensor]) -> Callable[[Trained], Trained]:
    return lambda a: put(a, {n: change(t) if t.dim() > 1 else t for n, t in tensors(a).items()})


def with_metric(key: str, value: object) -> Callable[[Trained], Trained]:
    return lambda answer: Trained({**answer.metrics, key: value}, answer.tensors)  # type: ignore


def nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] = float("nan")
    return tensor


FAULTS = {
    "nan": (with_all(nan), "refused", "is not finite"),
    "infinity": (with_all(lambda t: t / 0), "refused", "is not finite"),
    "too far": (with_all(lambda t: t * 1e6), "refused", "moves the weights by"),
    "another shape": (with_all(torch.ravel), "refused", "has shape"),
    "another dtype": (with_all(Tensor.double), "refused", "has dtype float64"),
    "one more": (
        lambda a: put(a, {**tensors(a), "x": torch.zeros(1)}),
        "refused",
        "missing or not expected: x",
    ),
    "steps": (with_metric("steps", 10**9), "refused", "'steps' is 1e+09"),
    "another's": (with_metric("partition-id", 77), "refused", "was not asked to train"),
    "an error": (lambda answer: "Traceback …\nno more\nmemory", "failed", "memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoiled_answer_costs_the_round_that_update_and_nothing_more(fault, tmp_path):
    config = small(rounds=1, train__local_steps=1, server__max_update_norm=50.0)
    change, kind, reason = FAULTS[fault]
    asked: list[int] = []

    def tamper(round_: int, partition: int, answer: Trained) -> Trained | str:
        asked.append(partition)
        return change(answer) if partition == asked[0] else answer

    def silent(round_: int, partition: int, answer: Trained) -> Trained | str:
        asked.append(partition)
        return "away" if partition == asked[0] else answer

    without = directly(config, silent).weights_sha256
    culprit = asked[0]
    asked.clear()
    logged = config.overlay(checkpoint__folder=str(tmp_path))
    assert directly(logged, tamper).weights_sha256 == without
    (line,) = (line for line in lines_of(tmp_path) if line["kind"] == "round")
    assert [entry["client"] for entry in line[kind]] == [culprit]
    assert reason in line[kind][0]["reason"]
    assert line["updates"] == config.cohort - 1


# What the server makes of updates: by every strategy of ours and Flower's, and privately.
WAYS = [
    *({"strategy__name": name} for name in names() if name not in PERSONAL),
    *(
        {"privacy__mechanism": f"{who}_{how}", "privacy__noise_multiplier": 0.1}
        for who in ("server", "client")
        for how in ("fixed", "adaptive")
    ),
]


def way(changes: Mapping[str, object]) -> str:
    return str(next(iter(changes.values())))


@pytest.mark.parametrize("changes", WAYS, ids=way)
def test_a_refused_update_is_in_no_aggregate(changes):
    """NaN, and a distance that would be the aggregate's: as if these had not answered."""
    config = small(
        rounds=1,
        cohort=6,
        train__local_steps=1,
        server__max_update_norm=50.0,
        **changes,
    )
    spoil = {0: with_all(nan), 3: with_all(lambda t: t * 1e6)}

    def spoiled(round_: int, partition: int, answer: Trained) -> Trained | str:
        return spoil[partition](answer) if partition in spoil else answer

    def silent(round_: int, partition: int, answer: Trained) -> Trained | str:
        return "away" if partition in spoil else answer

    assert directly(config, spoiled).weights_sha256 == directly(config, silent).weights_sha256


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """List what is fetched from a device, or waits for one, outside local training.

    Each with how many numbers. Updates are sorted as on a device, where NumPy does not do it.
    """
    found: list[tuple[str, int]] = []
    paused = 0

    def quietly(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments, **options):
            nonlocal paused
            paused += 1
            try:
                return original(*arguments, **options)
            finally:
                paused -= 1

        return call

    def counting(name: str) -> Callable[..., object]:
        original = getattr(Tensor, name)

        def call(tensor: Tensor, *arguments, **options):
            if not paused:
                found.append((name, tensor.numel()))
            return original(tensor, *arguments, **options)

        return call

    names = ("cpu", "numpy", "item", "tolist", "__bool__", "__int__", "__float__", "__array__")
    with (
        patch.object(SequentialTrainer, "train", quietly(SequentialTrainer.train)),
        patch.object(robust, "_ascending", lambda values: values.sort(dim=0).values),
    ):
        patches = [patch.object(Tensor, name, counting(name)) for name in names]
        for one in patches:
            one.start()
        try:
            yield found
        finally:
            for one in patches:
                one.stop()


OWN = [
    {"strategy__name": "fedper", "evaluation__client_fraction": 0.2},
    {"train__keep_momentum": True, "train__momentum": 0.9},
]


@pytest.mark.parametrize("normalizer", ["group", "batch"])
@pytest.mark.parametrize("changes", [*WAYS, *OWN], ids=way)
def test_nothing_is_fetched_from_the_device_for_a_single_client(normalizer, changes):
    if normalizer == "batch" and "privacy__mechanism" in changes:
        pytest.skip("its statistics would get through without noise")
    found: dict[int, list[tuple[str, int]]] = {}
    for cohort in (4, 6):
        config = small(
            rounds=1, cohort=cohort, train__local_steps=1, normalizer__name=normalizer, **changes
        )
        with counted() as calls:
            size = sum(value.size for value in directly(config).tensors.values())
        found[cohort] = sorted(calls)
    assert [name for name, _ in found[4]] == [name for name, _ in found[6]]
    # Nor for all of them: the model that they make, and small answers.
    assert found[6]
    assert max(numbers for _, numbers in found[6]) <= size
