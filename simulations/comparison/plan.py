"""What a comparison will take, told before it begins: cells, steps, time, memory."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean

import psutil
import torch
from flwr.app import Context, RecordDict

from clients.session import open_session
from clients.trainer import SequentialTrainer
from fedkn.config import ExperimentConfig
from fedkn.experiment import federated_data
from fedkn.training import LocalTask, evaluate
from simulations.comparison.duration import duration
from simulations.comparison.grid import (
    GridConfig,
    Group,
    experiments,
    groups,
    result_cells,
    search_cells,
    searches,
    untrainable,
)
from simulations.comparison.pool import cells_at_once
from simulations.comparison.scheduler import expected_cost
from simulations.comparison.search import MOST_EXTENSIONS
from simulations.runs.power import ALPHA, FEWEST_SEEDS, detectable_difference
from simulations.runs.records import PartitionRecord, partition_label

__all__ = ["Plan", "planned", "steps_of", "told"]

# Timing them ends when it has taken so long: the others are taken in proportion.
_BUDGET_SECONDS = 5.0
_STEPS_TIMED = 3
_EXAMPLES_TIMED = 64
_LONG_SECONDS = 3600.0


@dataclass(frozen=True)
class Speed:
    """Seconds on one core: of a client's step, of evaluating an example, of a client's round.

    The last is what a client does once a round, however many its steps are: a pass over all its
    images, for normalizers that take one.
    """

    step: float
    example: float
    turn: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a comparison will take.

    Attributes:
        results, searched: cells that measure, and cells that try learning rates. more: how many a
            search may add at most, going beyond its rates.
        steps: local steps of all clients in all of these cells, without what a search may add.
        seconds: of wall clock, with `workers` cells at a time; NaN where nothing could be timed.
        timed, kinds: how many kinds of cells (normalizer, batch size, further axes) were timed
            here, of how many.
        bytes: that this process has in memory, with data and model, as each worker will.
        longest: steps of a client in a round, of the kind that takes most.
        seeds, pairs: of a group, and pairs of normalizers and of values of axes that are tested.
        at_most: whether cells may end before their last round (evaluation.patience).
    """

    results: int
    searched: int
    more: int
    steps: int
    seconds: float
    workers: int
    timed: int
    kinds: int
    bytes: int
    longest: int
    seeds: int = 0
    pairs: int = 0
    at_most: bool = False

    @property
    def is_long(self) -> bool:
        """Whether it takes more than an hour."""
        return self.seconds > _LONG_SECONDS


def planned(grid: GridConfig, tables: Sequence[PartitionRecord]) -> Plan:
    """Return what `grid` will take, whose clients hold what `tables` say.

    A step of a client is timed here, on one core, for each kind of cell until 5 s are over; what is
    left is taken in proportion (`expected_cost`). What is not in it: starting processes, messages,
    and clients that share a core with other programs.
    """
    trained = [group for group in groups(grid) if not untrainable(group)]
    one = _with_one_seed(grid)
    kinds: dict[tuple[object, ...], ExperimentConfig] = {}
    for group in trained:
        kinds.setdefault(_kind(group), _result(one, group))
    speeds = _timed(kinds)
    sizes = _sizes(tables)
    steps, seconds, longest = 0.0, 0.0, 0
    tried = len(grid.compare.learning_rates) * grid.compare.search_seeds if searches(grid) else 0
    for group in trained:
        of_clients = sizes.get(partition_label(group.partition), [])
        for config, count in _alike(one, group, grid.compare.seeds, tried):
            in_round = [steps_of(config, size) for size in of_clients]
            of_cell = config.rounds * config.cohort * (fmean(in_round) if in_round else 0.0)
            longest = max([longest, *in_round])
            speed = speeds.get(_kind(group)) or _in_proportion(config, kinds, speeds)
            steps += count * of_cell
            evaluated = math.ceil(config.rounds / config.evaluation.every) + 1
            turns = config.rounds * config.cohort * speed.turn
            seconds += count * (of_cell * speed.step + turns + evaluated * _examples(config, speed))
    results, searched = len(trained) * grid.compare.seeds, len(trained) * tried
    workers = min(cells_at_once(grid), max(1, results + searched))
    more = 2 * MOST_EXTENSIONS * grid.compare.search_seeds * len(trained) if searches(grid) else 0
    return Plan(
        results=results,
        searched=searched,
        more=more,
        steps=round(steps),
        seconds=seconds / workers if speeds else math.nan,
        workers=workers,
        timed=len(speeds),
        kinds=len(kinds),
        bytes=psutil.Process(os.getpid()).memory_info().rss,
        longest=longest,
        seeds=grid.compare.seeds,
        pairs=_pairs(trained),
        at_most=any(point.evaluation.patience for point in experiments(grid).values()),
    )


def told(plan: Plan) -> list[str]:
    """Return the plan in sentences, the last of them how to make a long one smaller."""
    cells = f"{plan.results:,} result cells"
    if plan.searched:
        cells += f" and {plan.searched:,} that try learning rates (up to {plan.more:,} more)"
    at_most = "at most " if plan.at_most else ""
    sentences = [f"{cells}: {at_most}about {plan.steps:,} local steps of clients."]
    if plan.pairs:
        sentences.append(_power(plan))
    memory = f"about {plan.bytes / 1e6:,.0f} MB of memory each"
    if math.isnan(plan.seconds):
        sentences.append(f"{plan.workers} at a time, {memory}; how long a step takes is not known.")
        return sentences
    of = "" if plan.timed == plan.kinds else f" of {plan.kinds}"
    sentences.append(
        f"Estimate: {duration(plan.seconds)} with {plan.workers} at a time, {memory} (steps and "
        f"evaluations of {plan.timed}{of} kinds of cells timed here on one core; without starting "
        "processes)."
    )
    if plan.is_long:
        sentences.append(
            "To make it smaller: fewer --seeds, --rounds, values of an axis or --learning-rate, "
            "shorter searches (--set compare.search_rounds=N), or fewer local steps (--set "
            f"train.local_steps=N; a client now takes up to {plan.longest:,} in a round)."
        )
    return sentences


def _power(plan: Plan) -> str:
    """What so many seeds will show, before any spread is known."""
    pairs = f"{plan.pairs:,} pair{'' if plan.pairs == 1 else 's'}"
    if plan.seeds < FEWEST_SEEDS:
        return f"With fewer than {FEWEST_SEEDS} seeds none of {pairs} can be tested."
    found = detectable_difference(1.0, plan.seeds, ALPHA / plan.pairs)
    return (
        f"{plan.seeds} seeds, {pairs} tested together: a true difference of {found:.2g} times its "
        "spread between seeds would be found 4 times in 5 (docs/compare.md)."
    )


def _pairs(trained: Sequence[Group]) -> int:
    """Pairs of normalizers, all else equal, and of values of each further axis."""
    fields: Counter[object] = Counter()
    for group in trained:
        settings = dict(group.settings)
        place = partition_label(group.partition), group.batch_size
        fields["normalizer", place, group.point] += 1
        for axis in settings:
            others = tuple((key, value) for key, value in group.point if key != axis)
            fields[axis, place, group.normalizer, others] += 1
    return sum(math.comb(count, 2) for count in fields.values())


def steps_of(config: ExperimentConfig, size: int) -> int:
    """Return the local steps of a round that a client with `size` examples takes at most.

    At most: a last batch that is too small for the normalizer is skipped.
    """
    train = config.train
    steps = train.local_epochs * math.ceil(size / (train.batch_size * train.accumulate))
    return min(steps, train.local_steps) if train.local_steps else steps


def _kind(group: Group) -> tuple[object, ...]:
    return group.normalizer, group.batch_size, group.point


def _with_one_seed(grid: GridConfig) -> GridConfig:
    """The grid with the first cell of each kind alone: the others take as long."""
    compare = grid.compare.model_copy(update={"seeds": 1, "search_seeds": 1})
    return grid.model_copy(update={"compare": compare})


def _result(one: GridConfig, group: Group) -> ExperimentConfig:
    (cell,) = result_cells(one, group, one.compare.learning_rates[0])
    return cell.config


def _alike(
    one: GridConfig, group: Group, results: int, tried: int
) -> Iterator[tuple[ExperimentConfig, int]]:
    """Yield the configuration of a result cell and of a search cell, and how many take as long."""
    yield _result(one, group), results
    if tried:
        (cell,) = search_cells(one, group, one.compare.learning_rates[0])
        yield cell.config, tried


def _sizes(tables: Sequence[PartitionRecord]) -> dict[str, list[int]]:
    """The clients' numbers of examples by partition, over all seeds."""
    sizes: dict[str, list[int]] = {}
    for table in tables:
        sizes.setdefault(table.partition, []).extend(sum(row) for row in table.counts)
    return sizes


def _timed(kinds: dict[tuple[object, ...], ExperimentConfig]) -> dict[tuple[object, ...], Speed]:
    """Time each kind until the budget is spent; one that fails is left to its cells to tell."""
    speeds: dict[tuple[object, ...], Speed] = {}
    begun = time.perf_counter()
    with _one_thread():
        for kind, config in kinds.items():
            if time.perf_counter() - begun > _BUDGET_SECONDS:
                break
            try:
                speeds[kind] = _speed(config)
            except Exception:
                continue
    return speeds


def _speed(config: ExperimentConfig) -> Speed:
    context = Context(
        run_id=0,
        node_id=0,
        node_config={"partition-id": 0, "num-partitions": config.partition.clients},
        state=RecordDict(),
        run_config=config.flat(),
    )
    session, client = open_session(context, None)
    # The first step pays for what is loaded and allocated once.
    updates = []
    for steps in (1, 1, 1 + _STEPS_TIMED):
        task = LocalTask(
            seed=config.seed,
            round_=1,
            client=client,
            train=config.train.model_copy(update={"local_steps": steps}),
            learning_rate=config.train.learning_rate,
            goal=session.task,
        )
        updates.append(SequentialTrainer().train(session, task, {})[0])
    step, turn = _divided(*((update.seconds, update.steps) for update in updates[1:]))
    examples, targets = (of[:_EXAMPLES_TIMED] for of in session.client_data(client))
    start = time.perf_counter()
    evaluate(
        session.workspace.model,
        examples,
        targets,
        session.inputs,
        config.evaluation.batch_size,
        goal=session.task,
    )
    return Speed(step, (time.perf_counter() - start) / len(examples), turn)


def _divided(few: tuple[float, int], many: tuple[float, int]) -> tuple[float, float]:
    """Return the seconds of a step and those beside the steps, of two timings: seconds and steps.

    Where more steps took no longer, or there were no more, all of it is taken as the steps'.
    """
    more = many[1] - few[1]
    step = (many[0] - few[0]) / more if more > 0 else 0.0
    if step <= 0:
        return many[0] / max(1, many[1]), 0.0
    return step, max(0.0, few[0] - step * few[1])


def _in_proportion(
    config: ExperimentConfig,
    kinds: dict[tuple[object, ...], ExperimentConfig],
    speeds: dict[tuple[object, ...], Speed],
) -> Speed:
    """The mean speed of what was timed, scaled by what a step's cost is expected to be."""
    if not speeds:
        return Speed(math.nan, math.nan)
    cost = _step_cost(config)
    steps = [of.step * cost / _step_cost(kinds[kind]) for kind, of in speeds.items()]
    of_all = speeds.values()
    return Speed(fmean(steps), fmean(of.example for of in of_all), fmean(of.turn for of in of_all))


def _step_cost(config: ExperimentConfig) -> float:
    one = config.model_copy(
        update={
            "rounds": 1,
            "cohort": 1,
            "train": config.train.model_copy(update={"local_steps": 1, "local_epochs": 1}),
        }
    )
    return expected_cost(one)


def _examples(config: ExperimentConfig, speed: Speed) -> float:
    """The seconds of one evaluation of the global model."""
    data = federated_data(config)
    split = data.test if config.evaluation.split == "test" else data.validation
    return len(split.targets) * speed.example


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, as workers do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
