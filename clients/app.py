"""The Flower ClientApp. The same object runs in every engine, simulated or deployed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients.control_variates import correction, next_control
from clients.device.consent import node_consent
from clients.local_state import local_state
from clients.privacy_account import PrivacyAccount, privacy_account
from clients.session import Session, open_session
from clients.trainer import current_trainer
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.federation import (
    ARRAYS,
    CLIP_NORM,
    CONFIG,
    CONTROL,
    LEARNING_RATE,
    METRICS,
    PROXIMAL_MU,
    ROUND,
    RUN_TOKEN,
    STATE_ROUND,
    arrays_to_tensors,
    evaluation_metrics,
    is_packed,
    join_answer,
    on_the_wire,
    packed,
    tensors_to_arrays,
    update_metrics,
)
from fedkn.normalizers import TensorRole
from fedkn.training import LocalTask, carried_part, evaluate
from fedkn.training.privacy_spent import PRIVACY, PrivacySpent
from fedkn.training.private import steps_of_a_round
from fedkn.training.update_clipping import clip_update

__all__ = ["app"]

ValueT = TypeVar("ValueT", int, float, str)

app = ClientApp()


@app.query()
def join(message: Message, context: Context) -> Message:
    """Tell the server which partition this client is, and how many images it holds."""
    session, partition = _opened(message, context)
    answer = join_answer(partition, len(session.parts[partition]))
    return Message(answer, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Load the received tensors and the client's own, train locally, answer with the update."""
    session, partition = _opened(message, context)
    received, told = _received(message)
    round_ = _told(told, ROUND, int)
    run = _told(told, RUN_TOKEN, str)
    own = local_state(context, partition, run)
    account = _account(session, context, partition, told)
    kept, lost = own.restore(_state_round(session, message, told))
    control = _control(message)
    own_control = carried_part(kept, _CONTROL)
    update, state = current_trainer().train(
        session,
        LocalTask(
            seed=session.config.seed,
            round_=round_,
            client=partition,
            train=session.config.train,
            learning_rate=_told(told, LEARNING_RATE, float),
            proximal_mu=_told(told, PROXIMAL_MU, float) if PROXIMAL_MU in told else 0.0,
            correction=_correction(session, control, own_control),
            carried={n: v for n, v in kept.items() if not n.startswith((_MODEL, _CONTROL))},
            largest_batch=session.largest_batch,
        ),
        {**received, **carried_part(kept, _MODEL)},
    )
    arrays = tensors_to_arrays(_sent(session, state, received, told))
    if account:
        # Before anything is kept or sent: what the account lacks must not leave the device.
        spent = account.charge(
            run,
            round_,
            PrivacySpent.restored(update.carried),
            _bytes(arrays),
            allow=node_consent(context.node_config).allow_spending,
        )
        update = replace(update, epsilon=spent.epsilon(session.config.privacy.delta))
    keep = {_MODEL + name: state[name] for name in session.local_tensors}
    keep |= {n: value for n, value in update.carried.items() if not n.startswith(PRIVACY)}
    following = next_control(
        own_control,
        control,
        received,
        state,
        steps=update.steps,
        learning_rate=_told(told, LEARNING_RATE, float),
    )
    keep |= {_CONTROL + name: value for name, value in following.items()}
    if keep:
        own.keep(round_, keep, horizon=_horizon(session.config))
    # As it was asked, so it is answered.
    answer = RecordDict(
        {
            ARRAYS: packed(arrays) if is_packed(message.content.array_records[ARRAYS]) else arrays,
            METRICS: update_metrics(
                partition, len(session.parts[partition]), update, state_lost=lost
            ),
        }
    )
    return Message(answer, reply_to=message)


@app.evaluate()
def evaluate_own(message: Message, context: Context) -> Message:
    """Evaluate the received model with the client's own tensors on the images that it keeps."""
    session, partition = _opened(message, context)
    received, told = _received(message)
    own = local_state(context, partition, _told(told, RUN_TOKEN, str))
    kept, _ = own.restore(_state_round(session, message, told))
    images, labels = session.held_data(partition)
    if not len(labels):
        raise UserError(
            f"client {partition} keeps no image to evaluate on: raise evaluation.client_fraction"
        )
    session.workspace.load(received, carried_part(kept, _MODEL))
    result = evaluate(
        session.workspace.model,
        images,
        labels,
        session.inputs,
        session.config.evaluation.batch_size,
    )
    metrics = evaluation_metrics(
        partition, result.examples, round(result.accuracy * result.examples), result.loss
    )
    return Message(RecordDict({METRICS: metrics}), reply_to=message)


_MODEL, _CONTROL = "model/", "control/"


def _opened(message: Message, context: Context) -> tuple[Session, int]:
    """Open the session, if the device's owner lets the run have it.

    Raises:
        UserError: they do not, or as `open_session`.
    """
    consent = node_consent(context.node_config)
    session, partition = open_session(context, message.content)
    consent.allow_run(session.config)
    return session, partition


def _account(
    session: Session, context: Context, partition: int, told: ConfigRecord
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


def _state_round(session: Session, message: Message, told: ConfigRecord) -> int:
    """Return the round that left the state to go on from; 0 where clients keep nothing to lose."""
    config = session.config
    keeps = (
        session.local_tensors
        or config.train.keep_momentum
        or CONTROL in message.content.array_records
    )
    return _told(told, STATE_ROUND, int) if keeps else 0


def _control(message: Message) -> dict[str, Tensor]:
    """Return the server's control variate by parameter; empty without SCAFFOLD."""
    record = message.content.array_records.get(CONTROL)
    return {} if record is None else arrays_to_tensors(record)


def _correction(
    session: Session, control: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return SCAFFOLD's correction for every parameter: zero for those that are not shared."""
    if not control:
        return {}
    shared = correction(control, own)
    parameters = session.workspace.model.named_parameters()
    return {name: shared.get(name, torch.zeros_like(p)).detach() for name, p in parameters}


def _sent(
    session: Session,
    state: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    told: ConfigRecord,
) -> dict[str, Tensor]:
    """Return the tensors of the update, clipped where the server asks for it."""
    tensors = {name: state[name] for name in on_the_wire(session.rule)}
    if CLIP_NORM not in told:
        return tensors
    shared = [name for name, role in session.rule.items() if role is TensorRole.SHARED]
    clipped = clip_update(
        {name: tensors[name].detach().cpu().numpy() for name in shared},
        {name: received[name].numpy() for name in shared},
        _told(told, CLIP_NORM, float),
    )
    return tensors | {name: torch.from_numpy(value) for name, value in clipped.items()}


def _horizon(config: ExperimentConfig) -> int:
    """Return how many rounds back the server may resume: its oldest checkpoint, and to spare."""
    checkpoint = config.checkpoint
    return (checkpoint.keep + 1) * checkpoint.every + config.server.max_failed_rounds


def _received(message: Message) -> tuple[dict[str, Tensor], ConfigRecord]:
    content = message.content
    return arrays_to_tensors(content.array_records[ARRAYS]), content.config_records[CONFIG]


def _told(told: ConfigRecord, key: str, kind: type[ValueT]) -> ValueT:
    value = told.get(key)
    if not isinstance(value, kind):
        raise UserError(f"the server's message has no {kind.__name__} '{key}'")
    return value
