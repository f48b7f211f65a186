"""What a device's owner lets runs do: refused in words that the server shows too."""

from __future__ import annotations

import json

import pytest
from flwr.app import Message, MessageType

from clients.app import app
from clients.device.check import check_start
from clients.device.consent import Consent, node_consent
from clients.device.settings import read_device
from clients.local_state import STATE_FOLDER
from clients.privacy_account import account_in
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import data_summary, federated_data
from fedkn.federation import join_request
from fedkn.training.privacy_spent import PrivacySpent
from fedkn.training.private import steps_of_a_round
from server.rounds.membership import ClientsMissing
from server.run import run_server
from tests.clients.test_app import context as node
from tests.clients.test_app import sent
from tests.server.fake_grid import FIRST_NODE, FakeGrid, ScriptedGrid, small

MINIMAL = 'name = "a"\nserver = "h:1"\npartition_id = 1\npartitions = 3\n'
PRIVATE = {
    "privacy__mechanism": "example",
    "privacy__noise_multiplier": 2.0,
    "privacy__secret": True,
}


@pytest.fixture(autouse=True)
def _server_process():
    ScriptedGrid([], lambda message: [])


def given(config, folder="", **consent):
    where = node(config)
    where.node_config |= Consent(**consent).node_config()
    if folder:
        where.node_config[STATE_FOLDER] = str(folder)
    return where


def join(config, **consent):
    query = Message(
        join_request(data_summary(config)), dst_node_id=9, message_type=MessageType.QUERY
    )
    return app(query, given(config, **consent))


@pytest.mark.parametrize(
    ("consent", "settings", "named"),
    [
        ({"private_only": True}, {}, r"consent\.private_only\): it has no differential"),
        (
            {"private_only": True},
            {"privacy__mechanism": "server_fixed"},
            "no differential privacy of examples",
        ),
        ({"private_only": True}, {**PRIVATE, "privacy__noise_multiplier": 0.0}, "no differential"),
        (
            {"private_only": True},
            {**PRIVATE, "privacy__secret": False},
            "tell its noise from the seed",
        ),
        ({"max_epsilon": 3.0}, {}, r"consent\.max_epsilon\): it has no differential"),
        ({"models": "resnet18, vgg6"}, {}, r"it trains '\w+'; agreed is one of resnet18, vgg6"),
        ({"max_rounds": 2}, {"rounds": 3}, "it has 3 rounds; agreed is at most 2"),
        (
            {"evaluation": False},
            {"evaluation__client_fraction": 0.3},
            r"client_fraction = 0",
        ),
    ],
)
def test_a_run_that_the_owner_does_not_want_is_refused(consent, settings, named):
    """On joining, in training and in evaluation, and nobody's word is taken that it joined."""
    config = small(**settings)
    for use in (
        lambda: join(config, **consent),
        lambda: app(sent(config), given(config, **consent)),
    ):
        with pytest.raises(UserError, match=named) as refused:
            use()
        assert str(refused.value).startswith("the owner of this device refuses the run")
        # The server shows 200 characters of what a device says.
        assert len(f"fedkn.errors.UserError: {refused.value}") < 200
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("consent", "settings"),
    [
        ({"private_only": True}, PRIVATE),
        ({"max_epsilon": 3.0}, PRIVATE),
        ({"models": f"vgg6,{small().model.name}"}, {}),
        ({"max_rounds": 3}, {"rounds": 3}),
        ({"evaluation": False}, {}),
        ({}, {}),
    ],
)
def test_a_run_that_the_owner_agrees_to_is_joined(consent, settings):
    assert join(small(**settings), **consent).has_content()


def test_epsilon_is_capped_for_life_across_runs_and_restarts(tmp_path):
    config = small(**PRIVATE)
    size = int(app(sent(config), node(config)).content.metric_records["metrics"]["num-examples"])
    cost = steps_of_a_round(size, config.train, config.privacy)
    cap = PrivacySpent(((*cost[:2], 5 * cost[2]),)).epsilon(1e-5) + 1e-9
    taken = 0
    for token in ("aa" * 8, "bb" * 8):
        for round_ in (1, 2, 3):
            where = given(config, tmp_path, max_epsilon=cap)  # another process each time
            message = sent(config, **{"run-token": token, "server-round": round_})
            if taken == 5:
                with pytest.raises(UserError, match=r"max_epsilon\): this round .* for life"):
                    app(message, where)
                continue
            app(message, where)
            taken += 1
    spent = account_in(tmp_path, 2).lifetime().epsilon(1e-5)
    assert taken == 5
    assert 0.9 * cap < spent <= cap


def test_the_cap_is_at_the_owners_delta_not_at_the_runs(tmp_path):
    """At delta 0.5 nearly everything costs nothing."""
    config = small(**PRIVATE, privacy__delta=0.5)
    reply = app(sent(config), given(config, tmp_path, max_epsilon=50.0))
    told = float(reply.content.metric_records["metrics"]["epsilon"])
    spent = account_in(tmp_path, 2).lifetime().epsilon(1e-5)
    assert told < 0.1 * spent
    with pytest.raises(UserError, match="max_epsilon"):
        app(sent(config), given(config, tmp_path, max_epsilon=1.01 * spent))


def with_consent(config, partition: int, **consent) -> FakeGrid:
    grid = FakeGrid(config)
    grid._contexts[FIRST_NODE + partition].node_config |= Consent(**consent).node_config()
    return grid


def test_the_server_says_why_a_device_did_not_join():
    config = small()
    grid = with_consent(config, 4, private_only=True)
    with pytest.raises(ClientsMissing, match=r"partitions 4\..*\(consent.private_only\)"):
        run_server(grid, config)


def test_the_server_says_whose_cap_is_reached_and_goes_on_with_the_others(tmp_path):
    config = small(**PRIVATE, rounds=3, cohort=6, checkpoint__folder=str(tmp_path))
    size = len(federated_data(config).parts[4])
    noise, rate, steps = steps_of_a_round(size, config.train, config.privacy)
    cap = PrivacySpent(((noise, rate, 2 * steps),)).epsilon(1e-5) + 1e-9
    run_server(with_consent(config, 4, max_epsilon=cap), config)
    log = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    rounds = [line for line in log if line["kind"] == "round"]
    assert [[entry["client"] for entry in line["failed"]] for line in rounds] == [[], [], [4]]
    assert "(consent.max_epsilon): this round would make" in rounds[2]["failed"][0]["reason"]
    assert [line["updates"] for line in rounds] == [6, 6, 5]


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"consent-privat-only": True}, "did you mean 'private_only'"),
        ({"consent-max-epsilon": -1}, "max_epsilon"),
        ({"consent-private-only": "perhaps"}, "private_only"),
        ({"consent-models": "resnet8x"}, "did you mean 'resnet8'"),
    ],
)
def test_a_slip_does_not_allow_what_was_meant_to_be_forbidden(entry, named):
    with pytest.raises(UserError, match=named):
        node_consent(entry)
    config = small()
    where = node(config)
    where.node_config |= entry
    with pytest.raises(UserError, match=named):
        app(sent(config), where)


def test_device_toml_carries_it_to_the_client(tmp_path):
    text = (
        '[consent]\nprivate_only = true\nmax_epsilon = 2\ndelta = 1e-6\nmodels = "resnet8"\n'
        "max_rounds = 50\nevaluation = false\n"
    )
    (tmp_path / "device.toml").write_text(MINIMAL + text)
    device = read_device(tmp_path)
    entries = {k: v for k, v in device.node_config().items() if str(k).startswith("consent-")}
    assert entries == {
        "consent-private-only": True,
        "consent-max-epsilon": 2.0,
        "consent-delta": 1e-6,
        "consent-models": "resnet8",
        "consent-max-rounds": 50,
        "consent-evaluation": False,
    }
    assert node_consent(device.node_config()) == device.consent


def test_flower_reads_it_as_it_was_meant(tmp_path):
    from flwr.common.config import parse_config_args

    from fedkn.supernode import supernode_command

    text = '[consent]\nprivate_only = true\nmax_epsilon = 2\nmodels = "resnet8, vgg6"'
    (tmp_path / "device.toml").write_text(MINIMAL + text)
    device = read_device(tmp_path)
    command = supernode_command(
        device.server, ca=device.ca, key=device.key, port=5000, node_config=device.node_config()
    )
    (settings,) = (command[i + 1] for i, one in enumerate(command) if one == "--node-config")
    assert node_consent(parse_config_args([settings])) == device.consent


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[consent]\nprivate = true", "did you mean 'consent.private_only'"),
        ("[consent]\nmax_epsilon = -1", r"consent\.max_epsilon"),
        ('[consent]\nmodels = "resnet9000"', "consent.models"),
    ],
)
def test_bad_entries_are_named(tmp_path, text, named):
    (tmp_path / "device.toml").write_text(MINIMAL + text)
    with pytest.raises(UserError, match=named):
        read_device(tmp_path)


def test_the_check_shows_what_was_decided_and_spent(tmp_path):
    text = "[consent]\nprivate_only = true\nmax_epsilon = 8\n"
    (tmp_path / "device.toml").write_text(MINIMAL + text)
    device = read_device(tmp_path)
    account_in(device.state, 1).charge("aa" * 8, 1, PrivacySpent().after(1.0, 0.08, 130), b"x")
    found = {finding.name: finding for finding in check_start(device)}
    assert found["privacy account"].message.startswith("epsilon 6.346 of 8 at delta 1e-05")
    assert "consent-private-only = True" in found["consent"].message
    (tmp_path / "state" / "privacy-account-1.json").write_bytes(b"damage")
    found = {finding.name: finding for finding in check_start(device)}
    assert found["privacy account"].status == "fail"


def test_somebodys_own_model_is_allowed_by_its_name_and_by_no_other():
    consent = Consent(models="resnet8, mynets:small")
    consent.check_names()
    own = ExperimentConfig.resolve({"model.name": "mynets:small"})
    consent.allow_run(own)
    for other in ("mynets:large", "othernets:small", "vgg6"):
        with pytest.raises(UserError, match=r"consent\.models"):
            consent.allow_run(ExperimentConfig.resolve({"model.name": other}))
    with pytest.raises(UserError, match="did you mean 'resnet8'"):
        Consent(models="resnet9").check_names()
