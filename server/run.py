"""A run of the server, from the initial model or the last checkpoint to the final weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from fedkn.config import ExperimentConfig
from fedkn.data.summary import DataSummary
from fedkn.errors import FedknError
from fedkn.experiment import data_summary, device_of
from fedkn.gpus import device_name
from fedkn.locks import Taken, held
from fedkn.network import pinned_weights
from fedkn.tasks import Metric
from fedkn.text import printable
from fedkn.training import Evaluation
from server.checkpoints import (
    Checkpoint,
    CheckpointNotWritten,
    CheckpointStore,
    weights_sha256,
)
from server.choice import Choice
from server.gate.plausible import most_examples
from server.global_model import GlobalModel
from server.metrics_log import LogNotWritten, MetricsLog
from server.observers import Audience, create_observers
from server.rounds.aggregation import Aggregator
from server.rounds.client_evaluation import ClientEvaluation, evaluate_clients
from server.rounds.identities import read_identities
from server.rounds.loop import Federation, NoValidUpdates, run_round
from server.rounds.membership import Membership
from server.rounds.participation import Participation, begin
from server.rounds.waiting import Waiting
from server.run_data import hold_to_data

__all__ = ["Outcome", "run_server"]

# Flower's own logger, so that `flwr run --stream` and the SuperLink's log show a run's progress.
_LOG = logging.getLogger("flwr")


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a run ended.

    Attributes:
        tensors: the final global tensors. weights_sha256: their hash.
        evaluation: of the final model. rounds: rounds run, those before a resume included.
        choice: the best round, where validation images decide.
    """

    tensors: dict[str, np.ndarray]
    weights_sha256: str
    evaluation: Evaluation
    rounds: int
    choice: Choice | None = None


def run_server(grid: Grid, config: ExperimentConfig, advice: str = "") -> Outcome:
    """Run the federation of `config` on `grid` and return how it ended.

    With ``checkpoint.folder`` set, the run logs its metrics there, writes checkpoints, and goes on
    from the newest good one if it finds any. It holds that folder as its one writer; `advice` is
    what another run that wants it is told.

    Raises:
        Taken: another process runs the folder; nothing was written.
        FedknError: clients missing, too many rounds without a valid update, a disk that takes no
            checkpoint, or a configuration that differs from the one which the folder's
            checkpoints were written with.
    """
    if weights := pinned_weights(config.model):
        config = config.resolve(config.flat(), weights)
    with ExitStack() as stack:
        folder = Path(config.checkpoint.folder)

        def hold() -> None:
            if config.checkpoint.folder:
                stack.enter_context(held(folder, advice))

        # A folder is made for a run that can begin, and then only.
        there = bool(config.checkpoint.folder) and folder.is_dir()
        if there:
            hold()
        return _logged(grid, config, (lambda: None) if there else hold)


def _logged(grid: Grid, config: ExperimentConfig, hold: Callable[[], None]) -> Outcome:
    log = MetricsLog(config.checkpoint.folder, config.checkpoint.cell)
    audience = Audience(config, log, create_observers(config))
    started = time.monotonic()
    try:
        outcome = _run(grid, config, audience, hold)
        audience.write(
            "end",
            status="completed",
            seconds=time.monotonic() - started,
            weights_sha256=outcome.weights_sha256,
            **_chosen(outcome),
        )
    except Taken:
        raise
    except FedknError as error:
        # The error itself must get through, also where the log is what cannot be written.
        with suppress(LogNotWritten):
            audience.write(
                "end",
                status="failed",
                seconds=time.monotonic() - started,
                error=str(error),
                # What it was to do: no line has said it.
                **({} if audience.begun else {"config": config.flat()}),
            )
        raise
    finally:
        with suppress(LogNotWritten):
            audience.close()
    return outcome


def _chosen(outcome: Outcome) -> dict[str, Any]:
    """Return what the last line says of the choice, if there was one."""
    if outcome.choice is None:
        return {}
    return {
        "rounds": outcome.rounds,
        "best_round": outcome.choice.round_,
        "best_value": outcome.choice.value,
    }


def _run(grid: Grid, config: ExperimentConfig, log: Audience, hold: Callable[[], None]) -> Outcome:
    model = GlobalModel(config)
    aggregator = Aggregator(config, model.rule, model.parameters)
    data = data_summary(config)
    hold()
    store = _store(config)
    _hold_to_data(config, data)
    begun = _begin(config, model, aggregator, store, log, data=data)
    tensors, finished, participation, choice = begun
    membership = Membership(
        grid,
        config.partition.clients,
        config.server.join_timeout,
        data=data,
        most_examples=partial(most_examples, config.server.max_examples, model.examples),
        identities=read_identities(config.checkpoint.folder),
    )
    if finished < config.rounds or config.evaluation.client_fraction:
        membership.join()
        _log_joined(log, finished, membership)
    waiting = Waiting(log, membership.age, membership.look)
    federation = Federation(config, grid, model, membership, aggregator, waiting)
    evaluation = None
    failed_rounds = 0
    while finished < config.rounds and not _is_over(config, choice):
        round_ = finished = finished + 1
        tensors, report = run_round(round_, tensors, participation, federation)
        participation = participation.after(round_, [u.partition for u in report.updates])
        failed_rounds = 0 if report.updates else failed_rounds + 1
        log.write("round", tensors, **report.fields())
        last = round_ == config.rounds
        evaluates = last or round_ % config.evaluation.every == 0
        # A round that brought nothing is no reason to go on, or to stop.
        if choice is not None and evaluates and not failed_rounds:
            choice = _choice_after(round_, tensors, choice, model=model, config=config, log=log)
            last = last or _is_over(config, choice)
        if evaluates:
            evaluation = model.evaluate(tensors)
            _log_evaluation(
                log, round_, evaluation, config.evaluation.split, tensors=tensors, whole=last
            )
        # Nor is it in a checkpoint: a resume tries it again.
        made = round_ - failed_rounds
        if store and made and (last or round_ % config.checkpoint.every == 0):
            state = aggregator.state()
            store.save(Checkpoint(made, tensors, state, participation, data, choice))
        if failed_rounds >= config.server.max_failed_rounds or (last and failed_rounds):
            raise NoValidUpdates(_no_valid(report.refused + report.failed, failed_rounds))
    chosen = finished
    if choice is not None and choice.tensors:
        tensors, chosen = dict(choice.tensors), choice.round_
    if evaluation is None or chosen != finished:
        # Of another round; or resumed after the last one, whose evaluation the log may have lost.
        evaluation = model.evaluate(tensors)
        _log_evaluation(
            log, chosen, evaluation, config.evaluation.split, tensors=tensors, whole=True
        )
    if config.evaluation.client_fraction:
        result = evaluate_clients(
            tensors,
            participation,
            config=config,
            grid=grid,
            membership=membership,
            fixed_sha256=model.fixed_sha256,
        )
        _log_clients(log, finished, config.evaluation.split, result)
    return Outcome(tensors, weights_sha256(tensors), evaluation, finished, choice)


def _is_over(config: ExperimentConfig, choice: Choice | None) -> bool:
    """Whether no more rounds are to be run, because none was better for long."""
    patience = config.evaluation.patience
    return choice is not None and patience > 0 and choice.waited >= patience


def _choice_after(
    round_: int,
    tensors: dict[str, np.ndarray],
    choice: Choice,
    *,
    model: GlobalModel,
    config: ExperimentConfig,
    log: Audience,
) -> Choice:
    """Return the choice after `round_`, judged by validation images."""
    judged = model.evaluate(tensors, "validation")
    if config.evaluation.split != "validation":
        _log_evaluation(log, round_, judged, "validation", tensors=tensors)
    keep = config.checkpoint.best
    return choice.after(round_, judged.value, tensors, metric=model.task.metric, keep=keep)


def _store(config: ExperimentConfig) -> CheckpointStore | None:
    if not config.checkpoint.folder:
        return None
    # Where a run is may change, how often it writes, who watches it and in how many processes it
    # trains: what it computes may not.
    computes = {
        key: value
        for key, value in config.flat().items()
        if not key.startswith(("checkpoint.", "observers.")) and key != "workers"
    }
    computes["checkpoint.best"] = config.checkpoint.best
    folder = Path(config.checkpoint.folder) / "cells" / config.checkpoint.cell
    return CheckpointStore(folder, config.checkpoint.keep, computes)


def _hold_to_data(config: ExperimentConfig, data: DataSummary) -> None:
    """Refuse to go on with a run folder whose cells were trained on other data."""
    if not config.checkpoint.folder:
        return
    folder = Path(config.checkpoint.folder)
    try:
        recorded = hold_to_data(folder, config.data, data)
    except OSError as error:
        raise CheckpointNotWritten(
            f"cannot write the record of the data in {folder} ({error.strerror or error}): free "
            "space or give another checkpoint.folder, and start again"
        ) from error
    if not recorded:
        _LOG.warning("%s says nothing of its data: there is nothing to compare with", folder)


def _begin(
    config: ExperimentConfig,
    model: GlobalModel,
    aggregator: Aggregator,
    store: CheckpointStore | None,
    log: Audience,
    *,
    data: DataSummary,
) -> tuple[dict[str, np.ndarray], int, Participation, Choice | None]:
    """Return the global tensors to begin with, the rounds that they have behind them, who took
    part in these, and the best of them where validation images decide.
    """
    restored = store.load_newest(data) if store else None
    device = device_name(device_of(config))
    if restored is not None:
        aggregator.load_state(restored.strategy)
        task = _told_task(config, model.task.metric)
        log.write("resume", round=restored.round_, time=time.time(), task=task, device=device)
        return restored.tensors, restored.round_, restored.participation, restored.choice
    tensors = model.tensors()
    log.write(
        "start",
        time=time.time(),
        purpose="search" if config.evaluation.split == "validation" else "result",
        config=config.flat(),
        device=device,
        parameters=model.size,
        tensors=len(tensors),
        local_tensors=model.local_tensors,
        model=model.record(),
        task=_told_task(config, model.task.metric),
    )
    _LOG.info("%s: %s", config.model.name, model.described)
    log.write("memory", **model.memory())
    _log_evaluation(log, 0, model.evaluate(tensors), config.evaluation.split, tensors=tensors)
    choice = Choice() if config.chooses else None
    return tensors, 0, begin(config.partition.clients), choice


def _log_clients(log: Audience, round_: int, split: str, result: ClientEvaluation) -> None:
    log.write("client_evaluation", round=round_, split=split, **result.fields())
    for entry in result.failed:
        _LOG.warning("evaluation: client %s: %s", entry["client"], entry["reason"])


def _log_joined(log: Audience, round_: int, membership: Membership) -> None:
    """Write who has joined, up to round `round_`, and what they hold."""
    if joined := membership.newcomers():
        log.write(
            "joined",
            round=round_,
            clients=[
                {
                    "client": member.partition,
                    "examples": member.examples,
                    # Most clients lack most classes.
                    "labels": {str(i): n for i, n in enumerate(member.labels) if n} or None,
                }
                for member in joined
            ],
        )


def _log_evaluation(
    log: Audience,
    round_: int,
    evaluation: Evaluation,
    split: str,
    *,
    tensors: dict[str, np.ndarray],
    whole: bool = False,
) -> None:
    """Write an evaluation, `whole` with what it says of every class."""
    # Of every round they would be most of the log.
    by_class = {"by_class": evaluation.by_class} if whole and evaluation.by_class else {}
    confusion = {"confusion": evaluation.confusion} if whole and evaluation.confusion else {}
    log.write(
        "evaluation",
        tensors,
        round=round_,
        split=split,
        metrics=evaluation.metrics,
        loss=evaluation.loss,
        examples=evaluation.examples,
        **by_class,
        **confusion,
    )


def _told_task(config: ExperimentConfig, metric: Metric) -> dict[str, Any]:
    """Return what the log says of the task; a bound that there is not is written as null."""
    return {
        "name": printable(config.task.name),
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "lowest": metric.lowest,
        "highest": metric.highest,
        "unit": metric.unit,
    }


def _no_valid(reasons: Sequence[dict[str, Any]], rounds: int) -> str:
    first = f" (client {reasons[0]['client']}: {reasons[0]['reason']})" if reasons else ""
    return f"no valid update in the last {rounds} round(s){first}"
