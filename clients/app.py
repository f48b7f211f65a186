"""The Flower ClientApp, and the same training without its messages for engines on one machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients.device.consent import node_consent
from clients.instructions import signed_by_the_server
from clients.local_state import LocalState, local_state
from clients.passes import own_model, prepared
from clients.privacy_account import PrivacyAccount, privacy_account
from clients.session import Session, config_in, open_session
from clients.trainer import Passes, Wanted, alone
from fedkn.algorithms import local_rules
from fedkn.config import ExperimentConfig
from fedkn.data.summary import DataSummary
from fedkn.direct import Asked, Trained
from fedkn.errors import UserError
from fedkn.federation import (
    ARRAYS,
    CONFIG,
    CONTROL,
    FIXED,
    LEARNING_RATE,
    METRICS,
    ROUND,
    RUN_TOKEN,
    STATE_ROUND,
    arrays_to_tensors,
    evaluation_metrics,
    is_packed,
    join_answer,
    packed,
    tensors_to_arrays,
    update_metrics,
)
from fedkn.stack import Flat
from fedkn.training import LocalRule, LocalTask, carried_part, evaluate
from fedkn.training.privacy_spent import PRIVACY, PrivacySpent
from fedkn.training.private import steps_of_a_round
from fedkn.training.rule import OWN_MODEL
from fedkn.training.transfer import moved

__all__ = ["app", "train_directly"]

_LOG = logging.getLogger("flwr")

ValueT = TypeVar("ValueT", int, float, str)
PutT = TypeVar("PutT")

app = ClientApp(mods=[signed_by_the_server])


@app.query()
def join(message: Message, context: Context) -> Message:
    """Tell the server which partition this client is, and how many images of each class it holds.

    Under differential privacy not of each class: no noise would be on these numbers.
    """
    session, partition = _opened(message, context)
    private = session.config.privacy.mechanism != "none"
    counts = () if private else session.label_counts(partition)
    answer = join_answer(partition, len(session.parts[partition]), counts)
    return Message(answer, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Load the received tensors and the client's own, train locally, answer with the update."""
    opened = _opened(message, context)
    received, told = _received(message)
    tensors = received, _given(message)
    metrics, arrays = alone(_trained(opened, context, told, tensors, tensors_to_arrays))
    # As it was asked, so it is answered.
    packs = is_packed(message.content.array_records[ARRAYS])
    answer = RecordDict(
        {ARRAYS: packed(arrays) if packs else arrays, METRICS: MetricRecord({**metrics})}
    )
    return Message(answer, reply_to=message)


def train_directly(asked: Asked, context: Context) -> Passes[Trained]:
    """Do what `train` does, for an engine on the same machine: the tensors stay on their device."""
    opened = _session(context, asked.data, asked.told)
    tensors = asked.sent.tensors(), asked.control.tensors() if asked.control else {}

    def put(tensors: Mapping[str, Tensor]) -> Flat | dict[str, Tensor]:
        flat = Flat.of(asked.sent.layout, tensors)
        # What the gate is to refuse, as it would have come by a message.
        return flat or arrays_to_tensors(tensors_to_arrays(tensors))

    return Trained(*(yield from _trained(opened, context, asked.told, tensors, put)))


@app.evaluate()
def evaluate_own(message: Message, context: Context) -> Message:
    """Evaluate the received model with the client's own tensors on the examples that it keeps."""
    session, partition = _opened(message, context)
    received, told = _received(message)
    own = local_state(context, partition, _told(told, RUN_TOKEN, str))
    kept, _ = own.restore(_state_round(session, (), told))
    examples, targets = session.held_data(partition)
    if not len(targets):
        raise UserError(
            f"client {partition} keeps no example to evaluate on: raise evaluation.client_fraction"
        )
    session.workspace.load(received, carried_part(kept, _MODEL), carried_part(kept, OWN_MODEL))
    result = evaluate(
        session.workspace.model,
        examples,
        targets,
        session.inputs,
        session.config.evaluation.batch_size,
        goal=session.task,
    )
    metrics = evaluation_metrics(partition, result.examples, result.value, result.loss)
    return Message(RecordDict({METRICS: metrics}), reply_to=message)


_MODEL = "model/"


def _trained(
    opened: tuple[Session, int],
    context: Context,
    told: Mapping[str, Any],
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]],
    put: Callable[[Mapping[str, Tensor]], PutT],
) -> Passes[tuple[dict[str, int | float], PutT]]:
    """Train a client; return the metrics of its update, and its tensors as `put` copies them.

    `opened`: the session and which client it is. `tensors`: what it received, and what the server's
    strategy sends beside the model.
    """
    session, partition = opened
    received, given = tensors
    round_ = _told(told, ROUND, int)
    run = _told(told, RUN_TOKEN, str)
    own = local_state(context, partition, run)
    changed = _data_changed(session, own)
    account = _account(session, context, partition, told)
    rules = local_rules(session.config, told, given, session.workspace.model)
    kept, lost = own.restore(_state_round(session, rules, told))
    # Rules reckon with both and with the model: one copy, if they are not there.
    given, kept = (moved(tensors, session.workspace.device) for tensors in (given, kept))
    task = LocalTask(
        seed=session.config.seed,
        round_=round_,
        client=partition,
        train=session.config.train,
        learning_rate=_told(told, LEARNING_RATE, float),
        rules=rules,
        given=given,
        carried={n: v for n, v in kept.items() if not n.startswith((_MODEL, OWN_MODEL))},
        largest_batch=session.largest_batch,
        goal=session.task,
    )
    begin = yield from prepared(session, task, {**received, **carried_part(kept, _MODEL)})
    update, state = yield Wanted(session, task, begin)
    sent = _sent(session, state, received, rules)
    # A copy, for the client's own model is trained where these tensors lie.
    result = put(sent)
    if account:
        # Before anything is kept or sent: what the account lacks must not leave the device.
        spent = account.charge(
            run,
            round_,
            PrivacySpent.restored(update.carried),
            _bytes(tensors_to_arrays(sent)),
            allow=node_consent(context.node_config).allow_spending,
        )
        update = replace(update, epsilon=spent.epsilon(session.config.privacy.delta))
    keep = {_MODEL + name: state[name].clone() for name in session.local_tensors}
    keep |= {n: value for n, value in update.carried.items() if not n.startswith(PRIVACY)}
    model = yield from own_model(session, task, received, carried_part(kept, OWN_MODEL))
    keep |= {OWN_MODEL + name: value for name, value in model.items()}
    if keep:
        own.keep(round_, keep, horizon=_horizon(session.config))
    metrics = update_metrics(
        partition,
        len(session.parts[partition]),
        update,
        state_lost=lost,
        data_changed=changed,
    )
    return metrics, result


def _opened(message: Message, context: Context) -> tuple[Session, int]:
    told = message.content.config_records.get(CONFIG, ConfigRecord())
    return _session(context, message.content, told)


def _session(
    context: Context, content: RecordDict | DataSummary, told: Mapping[str, Any]
) -> tuple[Session, int]:
    """Open the session, if the device's owner lets the run have it.

    Raises:
        UserError: they do not, or as `open_session`.
    """
    # Before anything of the run is done here: a model of somebody's own is somebody's code.
    node_consent(context.node_config).allow_run(config_in(context))
    session, partition = open_session(context, content)
    if told.get(FIXED, session.fixed_sha256) != session.fixed_sha256:
        raise UserError(
            "the tensors that model.frozen keeps as they are differ from the server's: give both "
            "the same model, model.weights and version of PyTorch"
        )
    return session, partition


def _account(
    session: Session, context: Context, partition: int, told: Mapping[str, Any]
) -> PrivacyAccount | None:
    """Return the client's account, which can bear another round; None without DP-SGD.

    Raises:
        UserError: the account is damaged or lost, or its owner's cap is reached.
    """
    if session.config.privacy.mechanism != "example":
        return None
    account = privacy_account(context, partition)
    account.spent(_told(told, RUN_TOKEN, str), _told(told, STATE_ROUND, int))
    config = session.config
    cost = steps_of_a_round(len(session.parts[partition]), config.train, config.privacy)
    node_consent(context.node_config).allow_spending(account.lifetime().after(*cost))
    return account


def _bytes(arrays: ArrayRecord) -> bytes:
    return b"".join(name.encode() + array.data for name, array in arrays.items())


def _state_round(session: Session, rules: Sequence[LocalRule], told: Mapping[str, Any]) -> int:
    """Return the round that left the state to go on from; 0 where clients keep nothing to lose."""
    keeps = session.keeps_own or any(rule.carries for rule in rules)
    return _told(told, STATE_ROUND, int) if keeps else 0


def _data_changed(session: Session, own: LocalState) -> bool:
    """Return whether the device's own images are others than in its first round of this run."""
    if session.own_data is None:
        return False
    first = own.first_data(session.own_data)
    if found := first.changes(session.own_data):
        _LOG.warning(
            "this device's data changed since its first round of this run: %s. It trains on what "
            "is there now",
            "; ".join(found),
        )
    return bool(found)


def _given(message: Message) -> dict[str, Tensor]:
    """Return what the server's strategy sends beside the model, by parameter; often nothing."""
    record = message.content.array_records.get(CONTROL)
    return {} if record is None else arrays_to_tensors(record)


def _sent(
    session: Session,
    state: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    rules: Sequence[LocalRule],
) -> dict[str, Tensor]:
    """Return the tensors of the update, the shared ones as the rules have them sent."""
    tensors = {name: state[name] for name in session.sent_tensors}
    for rule in rules:
        tensors |= rule.sent({name: tensors[name] for name in session.shared_tensors}, received)
    return tensors


def _horizon(config: ExperimentConfig) -> int:
    """Return how many rounds back the server may resume: its oldest checkpoint, and to spare."""
    checkpoint = config.checkpoint
    return (checkpoint.keep + 1) * checkpoint.every + config.server.max_failed_rounds


def _received(message: Message) -> tuple[dict[str, Tensor], ConfigRecord]:
    content = message.content
    return arrays_to_tensors(content.array_records[ARRAYS]), content.config_records[CONFIG]


def _told(told: Mapping[str, Any], key: str, kind: type[ValueT]) -> ValueT:
    value = told.get(key)
    if not isinstance(value, kind):
        raise UserError(f"the server's message has no {kind.__name__} '{key}'")
    return value
