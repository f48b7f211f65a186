"""Clients that train together meet in one call, and answer for themselves alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from clients.trainer import Passes, Trained, Wanted
from simulations.engines.gathering import gathered

ANY: Any = None


def _client(name: str, passes: int = 1) -> Passes[str]:
    """A client that wants so many passes, and says what came of each."""
    said = name
    for number in range(passes):
        update, _ = yield Wanted(ANY, ANY, {name: ANY, "pass": number})  # type: ignore[dict-item]
        said += f" {update}"
    return said


def test_every_client_gets_its_own_result_from_one_call() -> None:
    calls: list[list[str]] = []

    def train(wanted: Sequence[Wanted]) -> list[Trained]:
        calls.append([next(iter(one.received)) for one in wanted])
        return [(f"{name}!", {}) for name in calls[-1]]  # type: ignore[misc]  # a stand-in

    clients = [_client("a", 2), _client("none", 0), _client("b"), _client("c", 3)]
    assert gathered(clients, train) == ["a a! a!", "none", "b b!", "c c! c! c!"]
    assert calls == [["a", "b", "c"], ["a", "c"], ["c"]]


def test_a_failure_of_the_training_is_each_clients_own() -> None:
    def train(wanted: Sequence[Wanted]) -> list[Trained]:
        raise ValueError("too large")

    def careful() -> Passes[str]:
        try:
            yield from _client("b")
        except ValueError as error:
            return f"saw {error}"
        return "saw nothing"

    found = gathered([_client("a"), _client("none", 0), careful()], train)
    assert [str(one) for one in found] == ["too large", "none", "saw too large"]
    assert isinstance(found[0], ValueError)


def test_a_client_that_fails_by_itself_does_not_hold_up_the_others() -> None:
    def failing() -> Passes[str]:
        yield from _client("x")
        raise OSError("full")

    found = gathered([failing(), _client("a")], lambda wanted: [(7, {}) for _ in wanted])  # type: ignore
    assert (str(found[0]), found[1]) == ("full", "a 7")


@pytest.mark.parametrize("clients", [0, 1])
def test_nobody_trains(clients: int) -> None:
    found = gathered([_client("none", 0)] * clients, lambda wanted: [])
    assert found == ["none"] * clients
