"""Every device of a fleet restarted in turn while a run goes on."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from server.deployment.fleet import Fleet
from server.deployment.processes import stop
from tests.deployment.fleets import (
    Run,
    a_fleet,
    bring_up,
    expected_weights,
    kill,
    losses,
    on_path,
    wait_for,
)
from tests.deployment.hostile import write_hook


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    """Three devices on this machine, up."""
    with a_fleet(tmp_path_factory.mktemp("fleets") / "fleet") as made:
        bring_up(made)
        yield made


def test_a_rolling_restart_loses_no_more_than_what_was_in_flight(fleet):
    with Run(fleet, "rolling", rounds=20, server__join_timeout=120) as run:
        for number, device in enumerate(fleet.devices):
            run.after_round(1 + 5 * number)
            # The first one crashes, the others are restarted as by systemctl.
            if number == 0:
                kill(fleet, device.name)
            else:
                stop(fleet, [device.name])
            bring_up(fleet)
        code, output = run.end()
    assert code == 0, output
    rounds = run.lines("round")
    assert [line["round"] for line in rounds] == list(range(1, 21))
    missed: dict[int, list[int]] = {}
    for line in rounds:
        for client in losses(line):
            missed.setdefault(client, []).append(line["round"])
    # The SuperLink lets one that crashed in again a minute after its last heartbeat. Nobody waits
    # for it longer, so it misses all rounds until then; one that signed off is waited for.
    assert all(len(of) == 1 for client, of in missed.items() if client), "one missed two rounds"
    assert missed[0] == list(range(missed[0][0], missed[0][-1] + 1))
    assert [line["updates"] for line in rounds] == [3 - len(losses(line)) for line in rounds]
    assert rounds[-1]["updates"] == 3
    assert not any(line["state_lost"] for line in rounds)
    assert "updates missing: client 0: round" in output


def test_a_restart_between_its_replies_loses_nothing(fleet, tmp_path, monkeypatch):
    """Another device holds its reply back, so that the round waits; the weights stay the same."""
    write_hook(tmp_path / "hook", "held(value)")
    monkeypatch.setenv("PYTHONPATH", on_path(tmp_path / "hook"))
    stop(fleet, [device.name for device in fleet.devices])
    bring_up(fleet)
    names = [device.name for device in fleet.devices]
    holds = [tmp_path / "hook" / f"hold-{name}" for name in names]
    # All of them have answered on joining.
    sent = dict.fromkeys(names, 1)
    holds[1].touch()
    with Run(fleet, "between", rounds=5) as run:
        for restarted, slow, next_slow in ((0, 1, 2), (1, 2, 0), (2, 0, None)):
            for name in names[:slow] + names[slow + 1 :]:
                sent[name] += 1
                wait_for(lambda name=name: replies(fleet, name) >= sent[name])
            sent[names[slow]] += 1
            # Until the server has fetched the replies, which it looks for four times a second.
            time.sleep(3)
            stop(fleet, [names[restarted]])
            bring_up(fleet)
            sent[names[restarted]] = 0  # in a new log
            if next_slow is not None:
                holds[next_slow].touch()
            holds[slow].unlink()
        code, output = run.end()
    assert code == 0, output
    assert [line["updates"] for line in run.lines("round")] == [3] * 5
    assert "updates missing" not in output
    assert run.lines("end")[0]["weights_sha256"] == expected_weights(rounds=5)


def replies(fleet: Fleet, name: str) -> int:
    """Return how many replies a device has sent since it was started."""
    return len(re.findall("Sent successfully", fleet.log(name).read_text(errors="replace")))
