"""The account of the privacy spent: it grows with all that is sent, and nothing takes it back."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from clients.app import app
from clients.local_state import STATE_FOLDER
from clients.privacy_account import account_in, privacy_account
from fedkn.errors import UserError
from fedkn.experiment import federated_data
from fedkn.federation import arrays_to_tensors
from fedkn.training.privacy_spent import PrivacySpent
from fedkn.training.private import steps_of_a_round
from tests.clients.test_app import context as node
from tests.clients.test_app import sent
from tests.server.fake_grid import ScriptedGrid, run, small

RUN, OTHER = "0123456789abcdef", "fedcba9876543210"
COST = PrivacySpent().after(1.0, 0.1, 5)


@pytest.fixture(params=["disk", "memory"])
def context(request, tmp_path) -> Context:
    node_config = {STATE_FOLDER: str(tmp_path)} if request.param == "disk" else {}
    return Context(run_id=1, node_id=9, node_config=node_config, state=RecordDict(), run_config={})


def file_in(folder: Path) -> Path:
    (path,) = folder.glob("privacy-account-*.json")
    return path


def test_a_new_client_has_spent_nothing(context):
    account = privacy_account(context, 3)
    assert account.spent(RUN, 0) == account.lifetime() == PrivacySpent()


def test_every_update_adds_up_whatever_the_round(context):
    for number, round_ in enumerate((1, 2, 5, 3, 4, 5), start=1):  # a server that resumed
        account = privacy_account(context, 3)
        total = account.charge(RUN, round_, COST, b"update %d" % number)
        assert total == PrivacySpent().after(1.0, 0.1, 5 * number)
        assert privacy_account(context, 3).spent(RUN, round_) == total


def test_what_was_sent_before_to_the_last_bit_costs_nothing(context):
    account = privacy_account(context, 3)
    once = account.charge(RUN, 4, COST, b"the same")
    assert account.charge(RUN, 4, COST, b"the same") == once
    assert account.charge(RUN, 4, COST, b"the samf") != once
    assert account.charge(RUN, 5, COST, b"the same").history == ((1.0, 0.1, 15),)


def test_runs_are_apart_and_count_together_for_life(context):
    account = privacy_account(context, 3)
    account.charge(RUN, 1, COST, b"a")
    account.charge(OTHER, 1, PrivacySpent().after(2.0, 0.5, 1), b"b")
    account.charge(RUN, 2, COST, b"c")
    assert account.spent(RUN, 2).history == ((1.0, 0.1, 10),)
    assert account.spent(OTHER, 1).history == ((2.0, 0.5, 1),)
    assert set(account.lifetime().history) == {(1.0, 0.1, 10), (2.0, 0.5, 1)}


def test_the_file_grows_by_runs_not_by_rounds(tmp_path):
    account = account_in(tmp_path, 0)
    sizes = []
    for round_ in range(1, 130):
        account.charge(RUN, round_, COST, b"%d" % round_)
        sizes.append(file_in(tmp_path).stat().st_size)
    assert sizes[-1] < sizes[69] + 20
    assert file_in(tmp_path).stat().st_mode & 0o777 == 0o600


def _charge_often(folder: Path, run: str) -> None:
    account = account_in(folder, 0)
    for round_ in range(1, 21):
        account.charge(run, round_, COST, b"%d" % round_)


def test_runs_that_go_on_at_once_lose_nothing_of_each_other(tmp_path):
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_charge_often, args=(tmp_path, r)) for r in (RUN, OTHER)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert account_in(tmp_path, 0).lifetime().history == ((1.0, 0.1, 200),)


def test_what_is_not_allowed_is_not_entered(context):
    account = privacy_account(context, 3)
    account.charge(RUN, 1, COST, b"a")

    def refuse(after: PrivacySpent) -> None:
        assert after.history == ((1.0, 0.1, 10),)
        raise UserError("too much")

    with pytest.raises(UserError, match="too much"):
        account.charge(OTHER, 1, COST, b"b", allow=refuse)
    assert account.lifetime() == COST


def test_clients_do_not_share_an_account(tmp_path):
    account_in(tmp_path, 0).charge(RUN, 1, COST, b"a")
    assert account_in(tmp_path, 1).lifetime() == PrivacySpent()


# -- damage ---------------------------------------------------------------------------------------


def test_every_flipped_bit_is_seen_and_refused(tmp_path):
    account = account_in(tmp_path, 0)
    account.charge(RUN, 1, COST, b"a")
    path = file_in(tmp_path)
    intact = path.read_bytes()
    for place in range(0, 8 * len(intact), 17):
        damaged = bytearray(intact)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        for use in (account.lifetime, lambda: account.spent(RUN, 0)):
            with pytest.raises(UserError, match=r"is damaged .*Put the file back"):
                use()
        with pytest.raises(UserError, match="is damaged"):
            account.charge(RUN, 2, COST, b"b")
        assert path.read_bytes() == damaged
    path.write_bytes(intact)
    assert account.spent(RUN, 1) == COST


@pytest.mark.parametrize("content", [b"", b"\n", b"{}", b"\xff\xfe"])
def test_an_emptied_file_is_damage_not_a_new_client(tmp_path, content):
    account = account_in(tmp_path, 0)
    account.charge(RUN, 1, COST, b"a")
    file_in(tmp_path).write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        account.lifetime()


def test_an_account_that_lacks_what_the_server_has_is_lost(context):
    account = privacy_account(context, 3)
    with pytest.raises(UserError, match=r"has no entry of this run, and the server has .* round 4"):
        account.spent(RUN, 4)
    account.charge(RUN, 4, COST, b"a")
    assert account.spent(RUN, 4) == COST
    with pytest.raises(UserError, match=r"ends with round 4 of this run, and .* round 6"):
        account.spent(RUN, 6)


def test_the_owner_may_begin_anew_and_is_told_what_that_leaves_out(tmp_path, caplog):
    account = account_in(tmp_path, 0)
    account.charge(RUN, 7, COST, b"a")
    path = file_in(tmp_path)
    path.write_bytes(b"damage")
    with pytest.raises(UserError) as refused:
        account.spent(RUN, 7)
    decision = path.with_name("privacy-account-0.json.begin-anew")
    assert f"'{decision.name}'" in str(refused.value)
    decision.touch()
    with caplog.at_level(logging.WARNING, logger="flwr"):
        assert account.spent(RUN, 7) == PrivacySpent()
    assert "leaves out what was sent before" in caplog.text
    assert path.with_name("privacy-account-0.json.damaged").read_bytes() == b"damage"
    assert not decision.exists()
    assert account.spent(RUN, 7) == PrivacySpent()
    with pytest.raises(UserError):
        account.spent(RUN, 8)  # a decision is for one loss


def test_one_run_that_is_lost_leaves_the_others_counted(tmp_path):
    account = account_in(tmp_path, 0)
    account.charge(OTHER, 1, COST, b"a")
    (tmp_path / "privacy-account-0.json.begin-anew").touch()
    assert account.spent(RUN, 3) == PrivacySpent()
    assert account.lifetime() == COST


def test_what_cannot_be_entered_is_not_sent(tmp_path):
    (tmp_path / "no folder").write_text("")
    account = account_in(tmp_path / "no folder" / "state", 0)
    with pytest.raises(UserError, match=r"no update is sent|damaged"):
        account.charge(RUN, 1, COST, b"a")


# -- as the ClientApp keeps it --------------------------------------------------------------------

PRIVATE = {"privacy__mechanism": "example", "privacy__noise_multiplier": 2.0}


@pytest.fixture
def _server_process():
    ScriptedGrid([], lambda message: [])


def asked(config, where: Context, round_: int, accepted: int, seed: int = 0) -> Message:
    message = sent(config, seed, **{"server-round": round_, "state-round": accepted})
    return app(message, where)


def reported(reply: Message) -> float:
    return float(reply.content.metric_records["metrics"]["epsilon"])


@pytest.mark.usefixtures("_server_process")
@pytest.mark.parametrize("accepts", ["all", "every second", "the last", "none"])
def test_epsilon_counts_every_update_whatever_the_server_accepts(accepts, tmp_path):
    config = small(**PRIVATE)
    where = node(config)
    where.node_config[STATE_FOLDER] = str(tmp_path)
    accepted, found = 0, []
    for round_ in range(1, 10):
        found.append(reported(asked(config, where, round_, accepted)))
        if accepts == "all" or (accepts == "every second" and round_ % 2 == 0):
            accepted = round_
    size = int(asked(config, where, 9, accepted).content.metric_records["metrics"]["num-examples"])
    cost = steps_of_a_round(size, config.train, config.privacy)
    delta = config.privacy.delta
    expected = [PrivacySpent(((*cost[:2], n * cost[2]),)).epsilon(delta) for n in range(1, 10)]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("heard", [(1, 2, 3, 4), (2, 4), (4,)])
def test_the_servers_log_has_what_a_client_sent_not_what_was_accepted(heard, tmp_path):
    """Updates of other rounds than those `heard` are refused, for client 0."""
    config = small(
        **PRIVATE, rounds=4, cohort=6, privacy__secret=True, checkpoint__folder=str(tmp_path)
    )

    def tamper(round_: int, partition: int, message: Message, reply: Message) -> list[Message]:
        if partition == 0 and round_ not in heard:
            del reply.content.array_records["arrays"]
        return [reply]

    run(config, tamper)
    log = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    rounds = [line for line in log if line["kind"] == "round"]
    assert [line["round"] for line in rounds if "0" in line["epsilon"]] == list(heard)
    size = len(federated_data(config).parts[0])
    noise, rate, steps = steps_of_a_round(size, config.train, config.privacy)
    expected = PrivacySpent(((noise, rate, 4 * steps),)).epsilon(config.privacy.delta)
    assert rounds[-1]["epsilon"]["0"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("_server_process")
def test_a_server_that_resumes_gets_the_same_update_for_nothing_and_another_for_its_price():
    config = small(**PRIVATE)
    where = node(config)
    first = reported(asked(config, where, 1, 0))
    second = asked(config, where, 2, 1)
    again = asked(config, where, 2, 1)
    assert reported(second) > first
    assert reported(again) == reported(second)
    # Another model in the same round, as a hostile server might send: a new update.
    assert reported(asked(config, where, 2, 1, seed=1)) > reported(second)


@pytest.mark.usefixtures("_server_process")
def test_secret_noise_costs_every_time():
    config = small(**PRIVATE, privacy__secret=True)
    where = node(config)
    found = [reported(asked(config, where, 1, 0)) for _ in range(3)]
    assert found[0] < found[1] < found[2]


@pytest.mark.usefixtures("_server_process")
def test_a_damaged_account_stops_private_training_alone(tmp_path):
    config = small(**PRIVATE)
    where = node(config)
    where.node_config[STATE_FOLDER] = str(tmp_path)
    asked(config, where, 1, 0)
    path = file_in(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged"):
        asked(config, where, 2, 1)
    plain = small()
    other = node(plain)
    other.node_config[STATE_FOLDER] = str(tmp_path)
    assert arrays_to_tensors(asked(plain, other, 2, 0).content.array_records["arrays"])


@pytest.mark.usefixtures("_server_process")
def test_momentum_is_taken_back_with_the_server_and_the_account_is_not(tmp_path):
    config = small(**PRIVATE, train__keep_momentum=True, train__momentum=0.9)
    where = node(config)
    where.node_config[STATE_FOLDER] = str(tmp_path)
    asked(config, where, 1, 0)
    kept = asked(config, where, 2, 1)
    asked(config, where, 3, 2)
    back = asked(config, where, 3, 1)  # the update of round 2 was forgotten
    assert reported(back) > reported(kept)
