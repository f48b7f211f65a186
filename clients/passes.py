"""The passes over a client's examples before and after the one whose result it sends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from clients.session import Session
from clients.trainer import Passes, Wanted
from fedkn.errors import UserError
from fedkn.training import LocalTask

__all__ = ["own_model", "prepared"]


def prepared(
    session: Session, task: LocalTask, begin: Mapping[str, Tensor]
) -> Passes[Mapping[str, Tensor]]:
    """Return the tensors from which the `task` begins: `begin`, after the preludes of its rules.

    Raises:
        UserError: with DP-SGD, whose account knows of one pass.
    """
    for rule in task.rules:
        if rule.prelude is None:
            continue
        _refuse_private(session)
        first, epochs = rule.prelude
        train = task.train.model_copy(update={"local_epochs": epochs})
        # Other rules have their say in it too, such as one that clips; what they carry is not kept.
        rules = tuple(first if other is rule else other for other in task.rules)
        _, state = yield Wanted(session, replace(task, rules=rules, train=train), begin)
        begin = {name: value.clone() for name, value in state.items()}
    return begin


def own_model(
    session: Session,
    task: LocalTask,
    received: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> Passes[dict[str, Tensor]]:
    """Return the client's own model after the round's pass by its rules; nothing if there is none.

    It begins where it was `before`, at first as the model that was `received`.

    Raises:
        UserError: with DP-SGD, whose account knows of one pass.
    """
    model: dict[str, Tensor] = {}
    for rule in task.rules:
        if rule.own is None:
            continue
        _refuse_private(session)
        rules = tuple(rule.own if other is rule else other for other in task.rules)
        own = replace(task, rules=rules, given=received, carried={})
        _, state = yield Wanted(session, own, before or received)
        model = {name: value.clone() for name, value in state.items()}
    return model


def _refuse_private(session: Session) -> None:
    if session.config.privacy.mechanism == "example":
        raise UserError(
            f"{session.config.strategy.name} trains more than once in a round, which "
            "privacy.mechanism = 'example' does not account for: set strategy.name = 'fedavg'"
        )
