"""The tables of a configuration that say what the server does: aggregate, judge, keep, tell."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedkn.options import Options
from fedkn.sections import Finite, Fraction, NonNegative, Positive, Section

__all__ = [
    "CheckpointConfig",
    "EvaluationConfig",
    "ObserversConfig",
    "PrivacyConfig",
    "ServerConfig",
    "StrategyConfig",
]


class StrategyConfig(Section):
    """How the server aggregates. "default" is Flower's own default of that strategy."""

    name: str = Field("fedavg", description="fedavg, fedprox, fedavgm, fedadam, fedyogi, …")
    proximal_mu: NonNegative = Field(0.01, description="fedprox: weight of the proximal term")
    personal_weight: NonNegative = Field(
        0.1, description="ditto: weight of the term that holds a client's own model (lambda)"
    )
    local_parameters: str = Field(
        "",
        description="fedper, fedrep: what stays on the client, as patterns of layers or parameters "
        "divided by commas (empty: the last linear layer)",
    )
    head_epochs: int = Field(
        1, ge=1, description="fedrep: passes in which the head is trained, before the body"
    )
    mixture: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="apfl: weight of a client's own model in its mixture, at first"
    )
    adaptive_mixture: bool = Field(True, description="apfl: every client learns its mixture")
    server_learning_rate: Positive | Literal["default"] = Field(
        "default",
        description="fedavgm, fedadam, fedyogi, fedadagrad, scaffold, fednova: the server's step",
    )
    server_momentum: Fraction = Field(0.9, description="fedavgm: the server's momentum")
    tau: Positive | Literal["default"] = Field(
        "default", description="fedadam, fedyogi, fedadagrad: degree of adaptivity"
    )
    q: NonNegative = Field(0.1, description="qfedavg: fairness (0 is FedAvg)")
    trim: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.2, description="fedtrimmedavg: part cut off at either end"
    )
    malicious_clients: int = Field(0, ge=0, description="krum, multikrum, bulyan: tolerated")
    options: Options = Field(
        "", description="[strategy.options]: what a strategy of your own takes"
    )


class PrivacyConfig(Section):
    """Differential privacy: of examples, on the clients, or of clients, in the aggregation."""

    mechanism: Literal[
        "none", "example", "server_fixed", "server_adaptive", "client_fixed", "client_adaptive"
    ] = Field(
        "none",
        description="example: DP-SGD on every client; server_… and client_…: updates are clipped "
        "by server or client, to a fixed or an adaptive norm, and the average is noised",
    )
    noise_multiplier: NonNegative = Field(1.0, description="deviation of the noise over the clip")
    clip_norm: Positive = Field(
        1.0, description="norm to which gradients (example) or updates are clipped, at first"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="example: delta of the privacy spent, (epsilon, delta)"
    )
    secret: bool = Field(
        False,
        description="draw noise (example: batches too) from the operating system, so that nobody "
        "can replay it; false: from the seed, which server and clients know",
    )


class EvaluationConfig(Section):
    """When and on what the server evaluates the global model."""

    split: Literal["test", "validation"] = Field("test", description="test or validation images")
    every: int = Field(1, ge=1, description="evaluate every so many rounds, and after the last")
    batch_size: int = Field(256, ge=1, description="images in an evaluation batch")
    target: Finite | Literal["auto", "none"] = Field(
        "auto",
        description="value of the deciding metric whose first round the report tells, in the "
        "metric's own unit (auto: 0.8 of accuracy, none of other metrics)",
    )
    patience: int = Field(
        0,
        ge=0,
        description="stop after so many evaluations without a better one, on validation examples "
        "(0: never)",
    )
    client_fraction: Fraction = Field(
        0.0,
        description="part of its images that every client keeps from training, to evaluate its "
        "own model on (0: none)",
    )


class ServerConfig(Section):
    """Limits of the server's patience."""

    round_timeout: Positive = Field(3600.0, description="seconds to wait for a round's updates")
    join_timeout: Positive = Field(120.0, description="seconds to wait for the clients to join")
    max_failed_rounds: int = Field(
        3, ge=1, description="end the run after so many rounds in a row without a valid update"
    )
    max_update_norm: NonNegative | Literal["auto"] = Field(
        "auto",
        description="refuse updates that move the weights by more than this norm (0: any norm; "
        "auto: ten times the cohort's median, docs/strategies.md)",
    )
    max_examples: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="refuse clients that declare more examples than this (0: any number; auto: "
        "ten times the clients' median, or as many as the experiment has)",
    )
    enough_updates: int = Field(
        0, ge=0, description="end a round with so many valid updates, not the cohort's (0: all)"
    )


class CheckpointConfig(Section):
    """Where the run folder is, and how many checkpoints are kept."""

    folder: str = Field("", description="run folder (empty: write nothing)")
    cell: str = Field("experiment", description="name of this experiment in the run folder")
    every: int = Field(1, ge=1, description="checkpoint every so many rounds, and after the last")
    keep: int = Field(2, ge=1, description="number of checkpoints kept")
    best: bool = Field(
        False,
        description="the result is the model of the round that is best on validation images, not "
        "of the last",
    )


def _joined(value: object) -> object:
    """Return names as one text, each once: a list of them, or a text with spaces between them."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return value
    return ",".join(dict.fromkeys(name.strip() for name in names if name.strip()))


class ObserversConfig(Section):
    """What watches the run on its server; it changes nothing of the result."""

    names: Annotated[str, BeforeValidator(_joined)] = Field(
        "",
        description="tensorboard, mlflow, wandb, or package.module:Observer; several by commas",
    )
    options: Options = Field(
        "", description="[observers.options]: each goes to those of the observers that take it"
    )
