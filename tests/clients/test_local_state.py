"""What a client keeps between rounds: versions by round, on disk and in memory alike."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict

from clients.local_state import STATE_FOLDER, LocalState, local_state
from fedkn.errors import UserError

RUN = "0123456789abcdef"


@pytest.fixture(params=["disk", "memory"])
def context(request, tmp_path) -> Context:
    node_config = {STATE_FOLDER: str(tmp_path)} if request.param == "disk" else {}
    return Context(run_id=1, node_id=9, node_config=node_config, state=RecordDict(), run_config={})


def state(context: Context, run: str = RUN, partition: int = 3) -> LocalState:
    return local_state(context, partition, run)


def kept(round_: int) -> dict[str, torch.Tensor]:
    return {"model/a.weight": torch.full((2, 3), float(round_)), "n": torch.tensor(round_)}


def test_a_new_client_has_lost_nothing(context):
    assert state(context).restore(0) == ({}, False)


def test_the_version_asked_for_comes_back(context):
    for round_ in (2, 5, 7):
        state(context).keep(round_, kept(round_), horizon=10)
    for round_ in (5, 2, 7):
        tensors, lost = state(context).restore(round_)
        assert not lost
        assert tensors.keys() == kept(round_).keys()
        assert all(torch.equal(tensors[k], v) for k, v in kept(round_).items())


def test_a_version_that_is_gone_is_reported_and_the_client_starts_anew(context, caplog):
    state(context).keep(2, kept(2), horizon=10)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert state(context).restore(3) == ({}, True)
    assert "starts anew" in caplog.text


def test_a_future_that_was_taken_back_is_forgotten(context):
    for round_ in (2, 5, 7):
        state(context).keep(round_, kept(round_), horizon=10)
    state(context).keep(4, kept(4), horizon=10)
    assert state(context).restore(2)[1] is False
    assert state(context).restore(5)[1] is True


def test_of_what_no_resume_can_ask_for_the_newest_is_kept(context):
    for round_ in (1, 2, 3, 9, 10):
        state(context).keep(round_, kept(round_), horizon=4)
    # A resume goes back to round 6 at most: this client's state was then that of round 3.
    assert [r for r in range(1, 11) if not state(context).restore(r)[1]] == [3, 9, 10]


def test_runs_and_clients_do_not_meet(context, tmp_path):
    state(context).keep(1, kept(1), horizon=4)
    assert state(context, run="ff" * 8).restore(1)[1]
    if context.node_config:
        assert state(context, partition=4).restore(1)[1]


def test_only_the_newest_runs_are_kept(tmp_path):
    context = Context(1, 9, {STATE_FOLDER: str(tmp_path)}, RecordDict(), {})
    runs = [f"{number:016x}" for number in range(5)]
    for run in runs:
        state(context, run).keep(1, kept(1), horizon=4)
    assert not state(context, runs[-1]).restore(1)[1]
    assert len(list((tmp_path / "client-3").iterdir())) <= 3


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_file_is_named(tmp_path, caplog, damage):
    context = Context(1, 9, {STATE_FOLDER: str(tmp_path)}, RecordDict(), {})
    state(context).keep(1, kept(1), horizon=4)
    (path,) = Path(tmp_path).rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert state(context).restore(1) == ({}, True)
    assert path.name in caplog.text


def test_every_flipped_bit_is_seen(tmp_path):
    context = Context(1, 9, {STATE_FOLDER: str(tmp_path)}, RecordDict(), {})
    state(context).keep(1, kept(1), horizon=4)
    (path,) = Path(tmp_path).rglob("*.safetensors")
    intact = path.read_bytes()
    for place in range(0, 8 * len(intact), 7):
        damaged = bytearray(intact)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert state(context).restore(1) == ({}, True)
    path.write_bytes(intact)
    assert not state(context).restore(1)[1]


@pytest.mark.parametrize("token", ["", "../../etc", "ABC", "a" * 100])
def test_a_token_cannot_name_another_folder(context, token):
    with pytest.raises(UserError, match="token"):
        state(context, token)
