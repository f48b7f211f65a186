"""A run on a fleet of devices: started through the Control API, followed by its run folder."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError
from fedkn.tasks.metric import ACCURACY, Metric
from fedkn.text import printable
from server.deployment.bundle import build_bundle
from server.deployment.certificates import public_pem
from server.deployment.control import Control, RunState, SuperLinkAway, advice
from server.deployment.fleet import Fleet
from server.deployment.own_code import own_code
from server.deployment.processes import main_processes
from server.deployment.programs import SUPEREXEC, SUPERLINK
from server.rounds.identities import write_identities
from simulations.runs.results import metric_of, number
from simulations.runs.tail import MetricsTail

__all__ = ["Progress", "follow_run", "run_deployed", "unfinished_run"]

Say = Callable[[str], None]

_POLL_SECONDS = 0.3
_STATUS_SECONDS = 2.0
# So long a SuperLink may be away before its run is given up on.
_AWAY_SECONDS = 600.0


@dataclass
class Progress:
    """What came of a run: its seconds of wall clock, and what its metrics.jsonl says.

    `training` is the time that a round's devices spent training, on average, summed over rounds;
    `missing` has by client the rounds that name it under refused or failed; `waiting` is the time
    in which nothing was waited for but the clients `waited_for`, which were not there.
    """

    seconds: float = 0.0
    training: float = 0.0
    waiting: float = 0.0
    waited_for: set[int] = field(default_factory=set)
    rounds: int = 0
    metric: Metric = ACCURACY
    value: float = math.nan
    weights_sha256: str = ""
    error: str = ""
    completed: bool = False
    round_seconds: list[float] = field(default_factory=list)
    missing: dict[int, list[int]] = field(default_factory=dict)

    @property
    def training_share(self) -> float:
        """Part of the wall clock in which devices trained."""
        return self.training / self.seconds if self.seconds else 0.0

    def take(self, line: Mapping[str, Any]) -> None:
        """Take in a line of metrics.jsonl."""
        match line["kind"]:
            case "round":
                self.rounds += 1
                self.round_seconds.append(line["seconds"])
                trained = number(line["train_seconds"])
                self.training += 0.0 if math.isnan(trained) else trained / max(line["updates"], 1)
                self.waiting += line.get("waiting_seconds", 0.0)
                self.waited_for |= set(line.get("waited_for", ()))
                named = {loss["client"] for loss in (*line["refused"], *line["failed"])}
                for client in named - {None}:
                    self.missing.setdefault(client, []).append(line["round"])
            case "start" | "resume" if "task" in line:
                self.metric = metric_of(line)
            case "evaluation" if line["split"] == "test":
                self.value = number(line["value"])
            case "end":
                self.completed = line["status"] == "completed"
                self.weights_sha256 = line.get("weights_sha256", "")
                self.error = line.get("error", "")


def run_deployed(fleet: Fleet, config: ExperimentConfig, control: Control, say: Say) -> Progress:
    """Run `config`, whose run folder exists, on `fleet`; tell `say` of every round.

    KeyboardInterrupt stops the run; its checkpoints stay. Whatever else ends this process does not:
    `follow_run` is for that.

    Raises:
        FedknError: as `follow_run`.
    """
    folder = Path(config.checkpoint.folder)
    keys = {device.partition: public_pem(fleet.public_key(device)) for device in fleet.devices}
    write_identities(folder, keys)
    tail = MetricsTail(folder / "metrics.jsonl")
    tail.poll()  # what a run before this one, now resumed, wrote
    own = own_code(config)
    for line in own.lines():
        say(line)
    run_id = control.start(build_bundle(own), config.flat())
    say(f"should this command be lost: {advice(fleet, folder)}")
    try:
        return follow_run(fleet, config, control, say, run_id=run_id, tail=tail)
    except KeyboardInterrupt:
        control.stop(run_id)
        raise


def unfinished_run(control: Control, folder: Path) -> RunState | None:
    """Return the run that goes on in `folder`, if one does."""
    going = (run for run in control.runs() if run.folder and not run.finished)
    return next((run for run in going if Path(run.folder) == folder.resolve()), None)


def follow_run(
    fleet: Fleet,
    config: ExperimentConfig,
    control: Control,
    say: Say,
    *,
    run_id: int,
    tail: MetricsTail,
) -> Progress:
    """Tell `say` of every round of a run until it ends; `tail` is at its first line.

    A SuperLink that is killed and started again meanwhile does not end the run, nor does whoever
    stops listening.

    Raises:
        FedknError: the run failed, was stopped by somebody else, or the SuperLink stayed away.
    """
    progress = Progress()
    started = time.monotonic()
    watch = _Watch(fleet, control, run_id, say)
    while True:
        # Before the lines are read: what a finished run wrote is then all there.
        state = watch.state()
        for line in tail.poll():
            progress.take(line)
            _tell(line, progress, config, say)
        if state is not None and state.finished:
            break
        time.sleep(_POLL_SECONDS)
    progress.seconds = time.monotonic() - started
    if not progress.completed or state.outcome != "completed":
        raise FedknError(_failure(progress, state, control))
    return progress


class _Watch:
    """Asks now and then how the run is, and bears a SuperLink that is away for a while."""

    def __init__(self, fleet: Fleet, control: Control, run_id: int, say: Say) -> None:
        self._fleet = fleet
        self._control = control
        self._run_id = run_id
        self._say = say
        self._next = 0.0
        self._away_since: float | None = None

    def state(self) -> RunState | None:
        """Return the run's state, or None where it was not asked for or not to be had."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + _STATUS_SECONDS
        try:
            state = self._control.run(self._run_id)
        except SuperLinkAway as error:
            if self._away_since is None:
                self._away_since = now
                self._say(f"{error}. The run goes on when it is back")
            if now - self._away_since > _AWAY_SECONDS:
                raise
            return None
        if self._away_since is not None:
            self._say(f"the SuperLink is back after {now - self._away_since:.0f} s")
            self._away_since = None
        there = main_processes(self._fleet)
        if not state.finished and SUPERLINK in there and SUPEREXEC not in there:
            # The SuperLink takes it for running yet, and whoever resumed it would be refused.
            with suppress(SuperLinkAway):
                self._control.stop(self._run_id)
            raise FedknError(
                "the SuperExec, which runs the server's part, does not run: "
                f"fedkn deploy up {self._fleet.path}"
            )
        return state


def _tell(line: Mapping[str, Any], progress: Progress, config: ExperimentConfig, say: Say) -> None:
    match line["kind"]:
        case "start":
            say(f"started: {line['parameters']} parameters, {config.rounds} rounds")
        case "resume":
            say(f"resumed after round {line['round']}")
        case "round":
            say(
                f"round {line['round']}/{config.rounds}: {line['updates']} of "
                f"{len(line['cohort'])} updates, {line['seconds']:.1f} s"
            )
            for kind in ("refused", "failed"):
                for loss in line[kind]:
                    say(f"  {kind}: client {loss['client']}: {loss['reason']}")
            for client in line.get("data_changed", ()):
                say(f"  client {client}: its own data changed since its first round of this run")
        case "waiting":
            say(f"round {line['round']}/{config.rounds}: {_waiting(line)}")
        case "evaluation":
            loss = number(line["loss"])
            shown = "not finite" if math.isnan(loss) else f"{loss:.4f}"
            where = "" if line["split"] == config.evaluation.split else f" ({line['split']} images)"
            said = f"{progress.metric.name} {number(line['value']):.4f}, loss {shown}{where}"
            say(f"round {line['round']}/{config.rounds}: {said}")
        case "warning":
            say(line["text"])


def _waiting(line: Mapping[str, Any]) -> str:
    ages = line.get("heartbeats", {})
    named = [
        f"{client} (heartbeat {ages[str(client)]:.0f} s ago)"
        if str(client) in ages
        else f"{client}"
        for client in line["clients"][:_NAMED]
    ]
    rest = len(line["clients"]) - len(named)
    more = f" and {rest} others" if rest else ""
    return f"waiting for client {', '.join(named)}{more}, for {line['seconds']:.0f} s"


def _failure(progress: Progress, state: RunState, control: Control) -> str:
    if progress.error:
        return f"the run failed: {progress.error}"
    if state.outcome == "stopped":
        return "the run was stopped"
    # Where not even the last line could be written, the error itself stands in the output, amid
    # the traceback and what Flower says of it.
    said = [line.strip() for line in control.output(state.run_id) if line.strip()]
    errors = [match[1] for line in said if (match := _ERROR.fullmatch(line))]
    begin = f"the run {state.outcome or 'ended early'} after {progress.rounds} rounds: "
    if errors:
        return begin + printable(errors[-1])
    # Killed, or by a fault beneath Python: what it printed last is what it did, not why it ended.
    last = f", the last that it printed: {printable(said[-1])}" if said else ""
    details = printable(state.details or "no reason given")
    return f"{begin}its process on the server was killed or crashed ({details}){last}"


_NAMED = 8

# The last line of a traceback.
_ERROR = re.compile(r"(?:[a-z_]\w*\.)*[A-Z]\w*: (.+)")
