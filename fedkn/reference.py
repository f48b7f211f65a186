"""Federated averaging of a normalizer on one page: the definition that every engine must equal.

No engine, no messages, nothing fast: read this first. It is FedAvg (arXiv 1602.05629, Algorithm
1) with what becomes of a normalizer's tensors in a round (`fedkn.normalizers`). Engines end in its
bits on the CPU, because every draw is seeded by what it is for and updates are added in the order
of the clients (tests/fedkn/test_reference.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkn.averaging import moment_pairs, pool_moments, weighted_mean, weighted_sum
from fedkn.config import ExperimentConfig
from fedkn.data.examples import Examples
from fedkn.errors import UserError
from fedkn.experiment import build_model, federated_data, inputs_of, normalizer_of, task_of
from fedkn.normalizers import FederationRule, TensorRole
from fedkn.seeds import derive, numpy_generator, torch_generator
from fedkn.training import Workspace, learning_rate, plan_batches, training_scores
from fedkn.training.adaptive_clipping import adaptive_clip
from fedkn.training.draws import own_draws

__all__ = ["federated_averaging"]

Arrays = Mapping[str, np.ndarray]


def federated_averaging(config: ExperimentConfig) -> dict[str, np.ndarray]:
    """Return the global tensors after the rounds of `config`, by name; computed on the CPU.

    Raises UserError where `config` asks for what is not on this page, or cannot work.
    """
    plain = config.strategy.name == "fedavg" and config.privacy.mechanism == "none"
    clipped = adaptive_clip(config) != 0
    if not plain or clipped or config.train.keep_momentum or config.train.accumulate > 1:
        raise UserError(
            "the reference is federated averaging alone: set strategy.name = 'fedavg', "
            "privacy.mechanism = 'none', train.adaptive_clip = 0, train.keep_momentum = false and "
            "train.accumulate = 1"
        )
    config = config.overlay(device="cpu")
    data, normalizer = federated_data(config), normalizer_of(config)
    workspace = Workspace(build_model(config))  # the model, and SGD on all of its parameters
    model = workspace.model
    parameters = {name for name, _ in model.named_parameters()}
    rule = normalizer.federation_rule(model)
    stays = {name for name, role in rule.items() if role is TensorRole.LOCAL}
    never = {n for n, role in rule.items() if role in (TensorRole.COUNTER, TensorRole.FIXED)}
    state = workspace.state()  # views: what is loaded and trained shows in them
    world = {n: t.numpy().copy() for n, t in state.items() if n not in stays | never}
    own = [{name: state[name].clone() for name in stays} for _ in data.parts]

    for round_ in range(1, config.rounds + 1):
        updates: list[tuple[Arrays, int]] = []
        draw = numpy_generator(config.seed, "cohort", round_)
        cohort = draw.choice(len(data.parts), config.cohort, replace=False)
        for client in sorted(cohort.tolist()):
            received = {name: torch.from_numpy(value) for name, value in world.items()}
            workspace.load(received, own[client])  # counts and what is frozen begin anew
            if _local_sgd(workspace, data.client(client), config, round_, client):
                own[client] = {name: state[name].clone() for name in stays}
                update = {name: state[name].numpy().copy() for name in world}
                updates.append((update, len(data.parts[client])))
        if updates:
            rule = normalizer.federation_rule(model, round_)
            world = _aggregated(world, updates, rule, parameters)
    return world


def _local_sgd(
    workspace: Workspace, data: Examples, config: ExperimentConfig, round_: int, client: int
) -> int:
    """Take a client's steps of one round on the model that was loaded; return how many."""
    model, optimizer, train = workspace.model, workspace.optimizer, config.train
    normalizer, inputs = normalizer_of(config), inputs_of(config, workspace.device)
    goal = task_of(config)  # says the loss
    seed, place, least = config.seed, (round_, client), normalizer.minimum_batch
    plan = plan_batches(len(data), train, least, seed=seed, round_=round_, client=client)
    model.train()
    normalizer.begin_training(model, round_)
    with own_draws(workspace.device, derive(seed, "network", *place)) as draws:
        for step, batch in enumerate(plan.batches):
            some, targets = data.inputs[batch], data.targets[batch]
            if inputs.augments:

                def augmented(what: Tensor, step: int = step) -> Tensor:
                    return inputs.augmented(what, torch_generator(seed, "augment", *place, step))

                some, targets = augmented(some), goal.moved(targets, augmented)
            optimizer.zero_grad()
            with draws.seeded(derive(seed, "dropout", *place, step)):
                outputs = training_scores(model, inputs(some), train.precision)
            goal.mean_loss(outputs, targets).backward()  # type: ignore[no-untyped-call]
            optimizer.limit(clip_norm=train.clip_norm, weight_decay=train.weight_decay)
            optimizer.move(learning_rate(train, round_, config.rounds), momentum=train.momentum)

        @torch.no_grad()
        def forward(batch_size: int) -> None:
            for some in torch.split(data.inputs, batch_size):
                model(inputs(some))

        draws.reseed(derive(seed, "statistics", *place))
        normalizer.end_training(model, forward, round_)  # statistics that need a pass of their own
    return len(plan.batches)


def _aggregated(
    world: Arrays,
    updates: Sequence[tuple[Arrays, int]],
    rule: FederationRule,
    parameters: set[str],
) -> dict[str, np.ndarray]:
    """Return the next global tensors, each by its role; what is frozen stays as it was sent."""
    states, examples = zip(*updates, strict=True)
    shares = [count / sum(examples) for count in examples]
    shared = {name for name, role in rule.items() if role is TensorRole.SHARED}
    following = {
        **world,
        **weighted_mean(states, examples, shared & parameters),
        **weighted_sum(states, shares, shared - parameters),  # running statistics, in float64
        **pool_moments(moment_pairs(rule), world, states, shares, rule.pooling_weight),
    }
    return {name: following[name].astype(old.dtype) for name, old in world.items()}
