"""device.toml, and the SuperNode that follows from it."""

from __future__ import annotations

import os
import sys

import pytest
from flwr.common.config import parse_config_args

from clients.device import start
from clients.device.profile import node_profile
from clients.device.settings import read_device
from clients.device.start import environment
from fedkn.errors import UserError
from fedkn.supernode import supernode_command
from server.deployment.creation import create_fleet

MINIMAL = 'name = "a"\nserver = "h:1"\npartition_id = 1\npartitions = 3\n'


def device_of(tmp_path, more="", text=MINIMAL):
    (tmp_path / "device.toml").write_text(text + more)
    return read_device(tmp_path)


def test_what_deploy_init_writes_can_be_read(tmp_path):
    fleet = create_fleet(tmp_path / "fleet", 2, "server.local", 8443)
    device = read_device(fleet.devices[1].folder)
    assert (device.name, device.partition, device.partitions) == ("device-1", 1, 2)
    assert (device.host, device.port) == ("server.local", 8443)
    assert (device.key, device.state) == (fleet.devices[1].key, fleet.devices[1].state)
    assert device.ca.read_bytes() == fleet.authority.read_bytes()
    commented = fleet.devices[1].config.read_text()
    for line in ("[data]", "source =", "root =", "[profile]", "batch_size =", "threads ="):
        assert f"# {line}" in commented
        commented = commented.replace(f"# {line}", line)
    assert device_of(tmp_path, text=commented).profile.batch_size == 2


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("colour = 1", r"unknown configuration key 'colour'"),
        ("[profile]\nbatchsize = 2", "did you mean 'profile.batch_size'"),
        ("[profile]\nthreads = -1", "profile.threads = -1"),
        ('[data]\nsource = "image_folders"\nroot = "x"', "did you mean 'image_folder'"),
        ('[data]\nsource = "arrays"', "no data-path"),
        ("[experiment.train]\nbatchsize = 1", "did you mean 'train.batch_size'"),
    ],
)
def test_bad_entries_are_named(tmp_path, more, named):
    with pytest.raises(UserError, match=named) as caught:
        device_of(tmp_path, more)
    assert str(caught.value).startswith(f"{tmp_path / 'device.toml'}: ")


def test_bad_addresses_and_partitions(tmp_path):
    for server in ("host", "https://host:1", "host:0", "host:70000"):
        with pytest.raises(UserError, match="give HOST:PORT"):
            device_of(tmp_path, text=MINIMAL.replace("h:1", server))
    with pytest.raises(UserError, match="must be below partitions = 3"):
        device_of(tmp_path, text=MINIMAL.replace("partition_id = 1", "partition_id = 3"))
    six = device_of(tmp_path, text=MINIMAL.replace("h:1", "[::1]:443"))
    assert (six.host, six.port, six.server) == ("::1", 443, "[::1]:443")
    with pytest.raises(UserError, match="fedkn deploy init"):
        read_device(tmp_path / "nowhere")


def test_an_experiment_to_try(tmp_path):
    other = tmp_path / "other.toml"
    other.write_text("[train]\nbatch_size = 16\n")
    device_of(tmp_path, "[experiment.train]\nbatch_size = 8\nmomentum = 0.5")
    train = read_device(tmp_path, other).experiment.train
    assert (train.batch_size, train.momentum) == (16, 0.5)
    assert read_device(tmp_path).experiment.partition.clients == 3


def test_flower_reads_the_node_config_as_it_was_meant(tmp_path):
    folder = tmp_path / "a folder with ü"
    folder.mkdir()
    more = '[data]\nroot = "my images"\n[profile]\nbatch_size = 2\nmemory_limit = 64'
    device = device_of(folder, more)
    command = supernode_command(
        device.server, ca=device.ca, key=device.key, port=5000, node_config=device.node_config()
    )
    assert command[1:4] == ("-P", "-m", "clients.device.supernode")
    given = dict(zip(command[4::2], command[5::2], strict=True))
    assert given["--superlink"] == "h:1"
    assert given["--auth-supernode-private-key"] == str(folder / "device.key")
    node = parse_config_args([given["--node-config"]])
    assert node == {
        "partition-id": 1,
        "num-partitions": 3,
        "device-name": "a",
        "state-folder": str(folder / "state"),
        "data-path": str(folder / "my images"),
        "batch-size": 2,
        "memory-limit": 64,
    }
    assert node_profile(node) == device.profile


def test_the_environment_of_a_supernode(tmp_path):
    device = device_of(tmp_path, "[profile]\nthreads = 3")
    given = environment(device, {"PATH": "/bin", "FLWR_OTHER": "x", "LANG": "C"})
    assert given["FLWR_HOME"] == str(tmp_path / "flwr")
    assert given["FLWR_TELEMETRY_ENABLED"] == "0"
    assert given["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert given["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert given["OMP_NUM_THREADS"] == "3"
    assert given["LANG"] == "C"
    assert "FLWR_OTHER" not in given


def test_it_becomes_the_supernode(tmp_path, monkeypatch):
    became = []
    monkeypatch.setattr(start.os, "execve", lambda *given: became.append(given))
    monkeypatch.chdir(tmp_path)
    device = device_of(tmp_path)
    start.become_supernode(device)
    ((program, command, settings),) = became
    assert os.access(program, os.X_OK)
    assert (program, command[3]) == (sys.executable, "clients.device.supernode")
    assert settings["FLWR_HOME"] == os.getcwd()  # noqa: PTH109 - as the SuperNode will see it
    assert device.state.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "name", ["\U0001f600", "Gerät 3", "a\\u007fb", "日本", "tab\\tbed", "c:\\\\d"]
)
def test_a_name_in_any_letters_reaches_the_client_as_it_is(tmp_path, name):
    text = MINIMAL.replace('"a"', f'"{name}"')
    folder = tmp_path / "ein \U0001f600 Ordner"
    folder.mkdir()
    device = device_of(folder, text=text)
    command = supernode_command(
        device.server, ca=device.ca, key=device.key, port=1, node_config=device.node_config()
    )
    settings = command[command.index("--node-config") + 1]
    assert parse_config_args([settings]) == device.node_config()
    assert device.node_config()["device-name"] == device.name
    assert device.node_config()["state-folder"] == str(folder / "state")


def test_what_flower_cannot_carry_is_refused_in_words(tmp_path):
    for folder in ("it's", os.fsdecode(b"caf\xe9")):
        (tmp_path / folder).mkdir()
        with pytest.raises(UserError, match="Flower's node config cannot carry") as caught:
            device_of(tmp_path / folder)
        str(caught.value).encode()
        with pytest.raises(UserError, match="give another folder") as caught:
            create_fleet(tmp_path / folder / "fleet", 1, "localhost", 8443)
        assert not (tmp_path / folder / "fleet").exists()
    with pytest.raises(UserError, match="unprintable"):
        create_fleet(tmp_path / "two\nlines", 1, "localhost", 8443)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("experiment = 1", "must be a table"),
        ("experiment = [1]", "must be a table"),
        ('[data]\nroot = "~nobody-of-this-name/x"', "write the path in full"),
        ("[profile]\nthreads = 99999999999999999999", "64 bits"),
    ],
)
def test_impossible_values_are_one_line(tmp_path, more, named):
    with pytest.raises(UserError, match=named) as caught:
        device_of(tmp_path, more)
    assert "\n" not in str(caught.value)
