"""Training for a moment, to know what a round will take on this device."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
from flwr.app import Context, RecordDict

from clients.device.finding import Finding
from clients.device.profile import MIB, step_bytes
from clients.device.settings import Device
from clients.session import Session, open_session
from clients.trainer import SequentialTrainer
from fedkn.errors import UserError
from fedkn.training import LocalTask
from fedkn.training.batches import plan_batches

__all__ = ["check_data", "check_training"]

_STEPS = 4


def check_data(device: Device) -> tuple[list[Finding], Session | None]:
    """Open the client's session as a round does; return what was found, and the session if any."""
    context = Context(
        run_id=0,
        node_id=0,
        node_config=dict(device.node_config()),
        state=RecordDict(),
        run_config=device.experiment.flat(),
    )
    try:
        session, partition = open_session(context, None)
    except UserError as error:
        return [Finding("data", "fail", str(error), "see [data] and [experiment]")], None
    labels = session.client_data(partition)[1].bincount().tolist()
    counts = ", ".join(f"{label}: {count}" for label, count in enumerate(labels) if count)
    where = device.data_path or f"partition {partition} of '{device.experiment.data.source}'"
    message = f"{sum(labels)} images to train on, by label {counts} ({where})"
    if held := len(session.held[partition]):
        message += f"; {held} kept to evaluate on"
    if not session.compared:
        message += "; held against the experiment's classes and image size on joining"
    return [Finding("data", "ok", message)], session


def check_training(session: Session, partition: int) -> Iterator[Finding]:
    """Yield the memory of a step of the configured model, and the time of a step and a round."""
    config, train = session.config, session.config.train
    plan = plan_batches(
        len(session.parts[partition]),
        train,
        session.normalizer.minimum_batch,
        seed=config.seed,
        round_=1,
        client=partition,
        largest_batch=session.largest_batch,
    )
    if not plan.steps:
        fix = "give it more images, or choose another normalizer"
        yield Finding("step", "fail", "every batch is smaller than the normalizer needs", fix)
        return
    size, asked = len(plan.batches[0]), train.batch_size
    if config.privacy.mechanism == "example":
        size = 1
    lowered = f" (the experiment asks for {asked})" if session.largest_batch < asked else ""
    examples, targets = session.client_data(partition)
    held = step_bytes(
        session.workspace,
        session.inputs,
        (examples[:1], targets[:1]),
        size,
        train=train,
        goal=session.task,
    )
    free = psutil.virtual_memory().available
    message = f"{held / MIB:.1f} MiB at batch size {size}{lowered}, {free / MIB:.0f} MiB free"
    fits = held < free or session.workspace.device.type != "cpu"
    fix = "" if fits else "set memory_limit in [profile]: smaller batches will be used"
    yield Finding("step's memory", "ok" if fits else "fail", message, fix)
    if not fits:
        return
    # The first step pays for what is loaded and allocated once.
    for steps in (1, _STEPS):
        task = LocalTask(
            seed=config.seed,
            round_=1,
            client=partition,
            train=train.model_copy(update={"local_steps": min(steps, len(plan.steps))}),
            learning_rate=train.learning_rate,
            largest_batch=session.largest_batch,
        )
        update, _ = SequentialTrainer().train(session, task, {})
    each = update.seconds / update.steps
    name = f"{config.model.name}, normalizer {config.normalizer.name}, {train.precision}"
    yield Finding(
        "step's time",
        "ok",
        f"{1000 * each:.0f} ms ({name}); a round is {len(plan.steps)} steps, "
        f"{each * len(plan.steps):.1f} s of training",
    )
    limit = config.server.round_timeout
    if each * len(plan.steps) > limit:
        yield Finding(
            "round",
            "fail",
            f"takes longer than server.round_timeout, {limit:.0f} s",
            "cap local_steps in [profile]",
        )
