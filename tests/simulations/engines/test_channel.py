"""Messages between an engine and its workers: whole, in order, however large they are."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simulations.engines import channel
from simulations.engines.channel import ClosedError, Inbox, Outbox, send
from simulations.engines.records import Bytes

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def numbers(size: int, value: float) -> tuple[Bytes, int]:
    data = Bytes()
    place = data.place_tensor(torch.full((size,), float(value)))
    return data, place


def mapped() -> int:
    """Return how many descriptors of files in memory this process has open."""
    folder = Path("/proc/self/fd")
    links = [str(path.readlink()) for path in folder.iterdir() if path.is_symlink()]
    return sum("memfd:fedkn" in link for link in links)


def test_messages_come_as_they_were_sent_and_stay_until_the_next_turn(ends: Ends) -> None:
    outbox, inbox = Outbox(ends[0]), Inbox(ends[1])
    for turn in range(3):
        outbox.restart()
        found = []
        # The file has to grow twice in the first turn.
        for number, size in enumerate((10, 1 << 19, 7, 1 << 20, 0, 1)):
            data, place = numbers(size, number + turn)
            outbox.send(number, {"place": place, "turn": turn}, data)
            received, value, there = inbox.receive()
            assert (received, value["turn"], there.lasting) == (number, turn, True)
            found.append(there.tensor(value["place"], (size,), torch.float32))
        for number, tensor in enumerate(found):
            assert torch.equal(tensor, torch.full_like(tensor, number + turn))


def test_one_that_finds_no_room_has_a_file_of_its_own(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_LEAST", 1 << 12)
    monkeypatch.setattr(channel, "_MOST", 1 << 12)
    outbox, inbox = Outbox(ends[0]), Inbox(ends[1])
    lasting = []
    for number, size in enumerate((100, 2000, 100, 900, 100)):
        data, place = numbers(size, number)
        outbox.send(number, place, data)
        received, value, there = inbox.receive()
        assert received == number
        assert there.tensor(value, (size,), torch.float32).tolist() == [number] * size
        lasting.append(there.lasting)
    assert lasting == [True, False, True, False, True]
    outbox.restart()
    outbox.send(9, "again", Bytes())
    assert inbox.receive()[2].lasting


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
def test_however_many_are_read_two_files_are_open(ends: Ends) -> None:
    outbox, inbox = Outbox(ends[0]), Inbox(ends[1])
    before, found = mapped(), []
    for number in range(50):
        data, place = numbers(1000, number)
        outbox.send(number, place, data)
        _, value, there = inbox.receive()
        found.append(there.tensor(value, (1000,), torch.float32))
    assert mapped() <= before + 2
    assert [tensor[0].item() for tensor in found] == list(range(50))


def test_messages_of_one_time_and_of_an_outbox_follow_each_other(ends: Ends) -> None:
    outbox, inbox = Outbox(ends[0]), Inbox(ends[1])
    outbox.send(1, "a", Bytes())
    send(ends[0], 2, "b")
    outbox.send(3, "c", Bytes())
    assert [inbox.receive()[:2] for _ in range(3)] == [(1, "a"), (2, "b"), (3, "c")]


def test_who_is_gone_is_noticed_in_the_middle_of_a_message(ends: Ends) -> None:
    outbox, inbox = Outbox(ends[0]), Inbox(ends[1])
    outbox.send(1, "a", Bytes())
    inbox.receive()
    ends[0].send(b"\0" * 5)
    ends[0].close()
    with pytest.raises(ClosedError):
        inbox.receive()
