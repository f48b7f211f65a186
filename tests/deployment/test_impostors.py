"""Devices with keys of their own that claim to be others, in a real fleet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from server.deployment import programs
from server.deployment.control import Control
from server.deployment.device_config import create_device_folder
from server.deployment.fleet import Device, Fleet
from server.deployment.ports import free_port
from server.deployment.processes import start, stop
from server.deployment.startup import bring_up
from tests.deployment.fleets import Run, a_fleet, expected_weights, losses, wait_for

SIZE = {"rounds": 2, "cohort": 2}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    """A server and two devices, which are not online."""
    with a_fleet(tmp_path_factory.mktemp("fleets") / "fleet", clients=2) as made:
        bring_up(made, local=True, say=lambda text: None)
        stop(made, [device.name for device in made.devices])
        yield made


def start_as(fleet: Fleet, device: Device, partition: int) -> None:
    """Start the SuperNode of `device`, which says that it is `partition`, and wait for it."""
    honest = programs.supernode(fleet, device, fleet.superlink_address, free_port())
    own, other = f"partition-id={device.partition}", f"partition-id={partition}"
    command = tuple(word.replace(own, other) for word in honest.command)
    assert any(other in word for word in command)
    log = fleet.log(device.name)
    begun = log.stat().st_size if log.exists() else 0
    start(fleet, programs.Program(device.name, command, honest.environment))
    wait_for(lambda: b"SuperNode ID:" in log.read_bytes()[begun:])


def test_a_key_of_no_device_takes_no_devices_place(fleet):
    """It is registered, claims partition 0, and was there first."""
    folder = fleet.path / "devices" / "stranger"
    stranger = Device("stranger", 0, folder)
    create_device_folder(fleet, stranger)
    with Control(fleet) as control:
        control.register(stranger)
    start_as(fleet, stranger, 0)
    for device in fleet.devices:
        start_as(fleet, device, device.partition)
    with Run(fleet, "stranger", **SIZE) as run:
        code, output = run.end()
    stop(fleet, [stranger.name])
    assert code == 0, output
    assert "is no client: its key is that of no device of this fleet" in newest_log(fleet)
    assert [line["updates"] for line in run.lines("round")] == [2, 2]
    assert run.lines("end")[0]["weights_sha256"] == expected_weights(partition__clients=2, **SIZE)


def test_a_device_that_claims_anothers_partition_is_refused_and_named(fleet):
    """By its own key it is partition 1; partition 0 is there, though the other was there first."""
    stop(fleet, [device.name for device in fleet.devices])
    start_as(fleet, fleet.devices[1], 0)
    start_as(fleet, fleet.devices[0], 0)
    with Run(fleet, "impostor", **SIZE, server__join_timeout=60) as run:
        code, output = run.end()
    assert code == 0, output
    text = "claims to be partition 0, but its key is that of partition 1"
    assert f"is no client: {text}" in newest_log(fleet)
    refused = {1: f"refused on joining: {text}"}
    assert [losses(line) for line in run.lines("round")] == [refused, refused]
    assert "updates missing: client 1: rounds 1-2" in output


def newest_log(fleet: Fleet) -> str:
    """Return what the ServerApp of the last run logged."""
    with Control(fleet) as control:
        return "\n".join(control.output(control.runs()[0].run_id))
