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
from fedkn.experiment import data_summary, task_of
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
from server.gate.plausible import most_examples
from server.global_model import GlobalModel
from server.metrics_log import LogNotWritten, MetricsLog
from server.rounds.aggregation import Aggregator
from server.rounds.client_evaluation import ClientEvaluation, evaluate_clients
from server.rounds.identities import read_identities
from server.rounds.loop import Federation, NoValidUpdates, RoundReport, run_round
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
    """

    tensors: dict[str, np.ndarray]
    weights_sha256: str
    evaluation: Evaluation
    rounds: int


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
    started = time.monotonic()
    try:
        outcome = _run(grid, config, log, hold)
    except Taken:
        raise
    except FedknError as error:
        # The error itself must get through, also where the log is what cannot be written.
        with suppress(LogNotWritten):
            log.write("end", status="failed", seconds=time.monotonic() - started, error=str(error))
        raise
    log.write(
        "end",
        status="completed",
        seconds=time.monotonic() - started,
        weights_sha256=outcome.weights_sha256,
    )
    return outcome


def _run(
    grid: Grid, config: ExperimentConfig, log: MetricsLog, hold: Callable[[], None]
) -> Outcome:
    model = GlobalModel(config)
    aggregator = Aggregator(config, model.rule, model.parameters)
    data = data_summary(config)
    hold()
    store = _store(config)
    _hold_to_data(config, data)
    tensors, finished, participation = _begin(config, model, aggregator, store, log, data=data)
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
    for round_ in range(finished + 1, config.rounds + 1):
        tensors, report = run_round(round_, tensors, participation, federation)
        participation = participation.after(round_, [u.partition for u in report.updates])
        failed_rounds = 0 if report.updates else failed_rounds + 1
        last = round_ == config.rounds
        _log_round(log, config, report)
        if last or round_ % config.evaluation.every == 0:
            evaluation = model.evaluate(tensors)
            _log_evaluation(log, config, round_, evaluation)
        # A round that brought nothing is not in a checkpoint: a resume tries it again.
        made = round_ - failed_rounds
        if store and made and (last or round_ % config.checkpoint.every == 0):
            store.save(Checkpoint(made, tensors, aggregator.state(), participation, data))
        if failed_rounds >= config.server.max_failed_rounds or (last and failed_rounds):
            raise NoValidUpdates(_no_valid(report.refused + report.failed, failed_rounds))
    if evaluation is None:
        # Resumed after the last round, whose evaluation the log may have lost.
        evaluation = model.evaluate(tensors)
        _log_evaluation(log, config, config.rounds, evaluation)
    if config.evaluation.client_fraction:
        result = evaluate_clients(
            tensors,
            participation,
            config=config,
            grid=grid,
            membership=membership,
            fixed_sha256=model.fixed_sha256,
        )
        _log_clients(log, config, result)
    return Outcome(tensors, weights_sha256(tensors), evaluation, config.rounds)


def _store(config: ExperimentConfig) -> CheckpointStore | None:
    if not config.checkpoint.folder:
        return None
    # Where a run is may change, how often it writes and in how many processes it trains: what it
    # computes may not.
    computes = {
        key: value
        for key, value in config.flat().items()
        if not key.startswith("checkpoint.") and key != "workers"
    }
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
    log: MetricsLog,
    *,
    data: DataSummary,
) -> tuple[dict[str, np.ndarray], int, Participation]:
    """Return the global tensors to begin with, the rounds that they have behind them, and who took
    part in these.
    """
    restored = store.load_newest(data) if store else None
    if restored is not None:
        aggregator.load_state(restored.strategy)
        task = _told_task(config, model.task.metric)
        log.write("resume", round=restored.round_, time=time.time(), task=task)
        _LOG.info("resuming after round %d", restored.round_)
        return restored.tensors, restored.round_, restored.participation
    tensors = model.tensors()
    log.write(
        "start",
        time=time.time(),
        purpose="search" if config.evaluation.split == "validation" else "result",
        config=config.flat(),
        parameters=model.size,
        tensors=len(tensors),
        local_tensors=model.local_tensors,
        model=model.record(),
        task=_told_task(config, model.task.metric),
    )
    _LOG.info("%s: %s", config.model.name, model.described)
    log.write("memory", **model.memory())
    _log_evaluation(log, config, 0, model.evaluate(tensors))
    return tensors, 0, begin(config.partition.clients)


def _log_clients(log: MetricsLog, config: ExperimentConfig, result: ClientEvaluation) -> None:
    fields = result.fields()
    log.write("client_evaluation", round=config.rounds, split=config.evaluation.split, **fields)
    for entry in result.failed:
        _LOG.warning("evaluation: client %s: %s", entry["client"], entry["reason"])
    if result.clients:
        _LOG.info(
            "clients' own models on their own examples: %s %.4f, worst tenth %.4f",
            result.metric.name,
            fields["mean"],
            fields["worst_tenth"],
        )


def _log_joined(log: MetricsLog, round_: int, membership: Membership) -> None:
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


def _log_round(log: MetricsLog, config: ExperimentConfig, report: RoundReport) -> None:
    log.write("round", **report.fields())
    _LOG.info(
        "round %d/%d: %d of %d updates, %.1f s",
        report.round_,
        config.rounds,
        len(report.updates),
        len(report.cohort),
        report.seconds,
    )


def _log_evaluation(
    log: MetricsLog, config: ExperimentConfig, round_: int, evaluation: Evaluation
) -> None:
    split, last = config.evaluation.split, round_ == config.rounds
    # Of every round they would be most of the log.
    by_class = {"by_class": evaluation.by_class} if last and evaluation.by_class else {}
    confusion = {"confusion": evaluation.confusion} if last and evaluation.confusion else {}
    log.write(
        "evaluation",
        round=round_,
        split=split,
        metrics=evaluation.metrics,
        loss=evaluation.loss,
        examples=evaluation.examples,
        **by_class,
        **confusion,
    )
    name = task_of(config).metric.name
    _LOG.info("round %d: %s %.4f on %s examples", round_, name, evaluation.value, split)


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
