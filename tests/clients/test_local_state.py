"""What a client keeps between rounds: versions by round, on disk and in memory alike."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from torch._subclasses import FakeTensorMode

from clients.local_state import STATE_FOLDER, Kept, LocalState, Room, local_state
from fedkn.data.fingerprint import Fingerprint
from fedkn.errors import UserError

RUN = "0123456789abcdef"


# On a device, and in an engine, whose states are of a kind of their own.
@pytest.fixture(params=["disk", "memory", "disk, engine", "memory, engine"])
def context(request, tmp_path) -> Context:
    node_config = {STATE_FOLDER: str(tmp_path)} if "disk" in request.param else {}
    own = Kept(Room()) if "engine" in request.param else RecordDict()
    return Context(run_id=1, node_id=9, node_config=node_config, state=own, run_config={})


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
    # An engine's state is one client's.
    if context.node_config and not isinstance(context.state, Kept):
        assert state(context, partition=4).restore(1)[1]


def test_only_the_newest_runs_are_kept(tmp_path):
    context = Context(1, 9, {STATE_FOLDER: str(tmp_path)}, RecordDict(), {})
    runs = [f"{number:016x}" for number in range(5)]
    for run in runs:
        state(context, run).keep(1, kept(1), horizon=4)
    assert not state(context, runs[-1]).restore(1)[1]
    assert len(list((tmp_path / "client-3").iterdir())) <= 3


def in_engine(room: Room, folder: Path | None = None) -> Context:
    node_config = {} if folder is None else {STATE_FOLDER: str(folder)}
    return Context(1, 9, node_config, Kept(room), {})


def test_an_engine_reads_no_file_that_it_wrote_while_there_is_room(tmp_path):
    context, crowded = in_engine(Room(), tmp_path), in_engine(Room(most=10), tmp_path / "crowded")
    for where in (context, crowded):
        state(where).keep(2, kept(2), horizon=10)
        state(where).keep(5, kept(5), horizon=10)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"")
    found, lost = state(context).restore(5)
    assert not lost
    assert all(torch.equal(found[name], value) for name, value in kept(5).items())
    assert state(context).restore(2)[1]
    assert state(crowded).restore(5)[1]


def test_what_is_kept_nowhere_else_needs_no_room():
    context = in_engine(Room(most=0))
    state(context).keep(2, kept(2), horizon=10)
    assert not state(context).restore(2)[1]


def test_on_a_device_clients_keep_as_much_as_there_is_room_for_the_rest_on_the_host():
    with FakeTensorMode():
        room = Room(most=1000)
        many = [Kept(room) for _ in range(4)]
        for one in many:
            one.put("run", 1, {"v": torch.empty(100, device="cuda")}, only=True)
        devices = [part.device.type for one in many for part in one.versions["run", 1].parts]
    assert devices == ["cuda", "cuda", "cpu", "cpu"]


def test_room_is_given_back_with_what_took_it(tmp_path):
    room = Room(most=100)
    for client in (0, 1):
        context = in_engine(room, tmp_path)
        for round_ in range(1, 9):
            state(context, partition=client).keep(round_, kept(round_), horizon=2)
            assert room.left == 100 - (client + 1) * (6 * 4 + 8)
    # Of a future that was taken back too.
    state(context, partition=1).keep(3, kept(3), horizon=2)
    assert room.left == 100 - 2 * (6 * 4 + 8)


def test_who_reads_what_is_kept_cannot_change_it():
    context = in_engine(Room())
    given = kept(2)
    state(context).keep(2, given, horizon=10)
    given["n"].zero_()
    state(context).restore(2)[0]["n"].zero_()
    assert state(context).restore(2)[0]["n"] == 2


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


def fingerprint(seed: int) -> Fingerprint:
    return Fingerprint(*[f"{seed:064x}"] * 3, (seed, 0, 0), "0" * 64, "1" * 64)


def test_the_first_data_of_a_run_are_remembered(context):
    one, other = fingerprint(1), fingerprint(2)
    assert state(context).first_data(one) == one
    assert state(context).first_data(other) == one
    state(context).keep(3, kept(3), horizon=4)
    assert state(context).first_data(other) == one
    # Between runs a device may well get more images.
    assert state(context, run="f" * 16).first_data(other) == other


def test_a_damaged_or_unwritable_record_of_the_data_is_said(tmp_path, caplog):
    context = Context(1, 9, {STATE_FOLDER: str(tmp_path)}, RecordDict(), {})
    state(context).first_data(fingerprint(1))
    (path,) = Path(tmp_path).rglob("data")
    path.write_text("{")
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert state(context).first_data(fingerprint(2)) == fingerprint(2)
    assert str(path) in caplog.text
    caplog.clear()
    (tmp_path / "file").write_text("in the way")
    blocked = Context(1, 9, {STATE_FOLDER: str(tmp_path / "file")}, RecordDict(), {})
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert state(blocked).first_data(fingerprint(2)) == fingerprint(2)
    assert "unseen" in caplog.text
