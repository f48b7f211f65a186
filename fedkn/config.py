"""The one experiment configuration: from TOML, the command line and Flower's run config alike.

An experiment is one federated run: one cell of a grid. Every field is a key of the same dotted
name everywhere: ``[train] batch_size = 2`` in TOML, ``--set train.batch_size=2`` on the command
line, ``train.batch_size=2`` in ``flwr run --run-config``. Fields hold only strings, numbers and
booleans, because those are what Flower's run config carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from fedkn.errors import UserError
from fedkn.options import Options, with_options
from fedkn.sections import (
    Fraction,
    NonNegative,
    Positive,
    Scalar,
    Section,
    check_keys,
    option_tables,
    validated,
)
from fedkn.server_sections import (
    CheckpointConfig,
    EvaluationConfig,
    ObserversConfig,
    PrivacyConfig,
    ServerConfig,
    StrategyConfig,
)
from fedkn.tables import flattened, nest

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "ModelConfig",
    "NormalizerConfig",
    "ObserversConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "ServerConfig",
    "StrategyConfig",
    "TaskConfig",
    "TrainConfig",
    "as_named_now",
]


class DataConfig(Section):
    """Which examples, and how a batch of them reaches the model."""

    source: str = Field(
        "digits",
        description="package.module:function, or data set: digits, mnist, image_folder, arrays, …",
    )
    root: str = Field("", description="folder (or .npz file) that holds the data")
    options: Options = Field(
        "", description="[data.options]: what a source of your own, or huggingface, is told"
    )
    download: bool = Field(False, description="let torchvision download the data into root")
    image_size: int = Field(0, ge=0, description="resize folders of images to this size (0: as is)")
    skip_damaged: bool = Field(
        False, description="leave out files of image folders that cannot be used (False: refuse)"
    )
    scaling: Literal["unit", "centered", "standardized", "published", "none"] = Field(
        "standardized",
        description="pixel scaling: unit [0,1], centered [-1,1], standardized by the training "
        "images' mean and deviation, published (what the normalizer's paper used), none (numbers "
        "as they are)",
    )
    flip: bool = Field(False, description="flip training images left-right at random")
    crop_padding: int = Field(0, ge=0, description="random crop after padding by so many pixels")
    validation_fraction: Fraction = Field(
        0.15, description="part of the training images kept by the server to choose settings on"
    )
    train_limit: int = Field(0, ge=0, description="use so many training examples (0: all)")
    test_limit: int = Field(0, ge=0, description="use so many test examples (0: all)")


class PartitionConfig(Section):
    """How the training examples are divided among the clients."""

    scheme: str = Field(
        "dirichlet",
        description="iid, dirichlet, shards, quantity, labels, natural or domains",
    )
    clients: int = Field(
        20, ge=0, description="number of clients (0, with flwr run: as many as SuperNodes)"
    )
    alpha: Positive = Field(0.3, description="dirichlet: concentration, smaller is more skewed")
    shards_per_client: int = Field(2, ge=1, description="shards: label shards for each client")
    labels_per_client: int = Field(2, ge=1, description="labels: labels of each client")
    sigma: NonNegative = Field(1.0, description="quantity: deviation of the log-normal sizes")
    minimum: int = Field(8, ge=1, description="every client has at least so many examples")


class ModelConfig(Section):
    """The network, the same for every normalizer."""

    name: str = Field(
        "resnet8", description="resnet8, resnet18, …, or your own: package.module:factory"
    )
    width: int = Field(0, ge=0, description="channels of the first stage (0: as published)")
    final_norm: Literal["none", "kernel", "own"] = Field(
        "kernel",
        description="normalization before the last pooling, for EVERY normalizer; a model of your "
        "own has what it has",
    )
    low_resolution: bool | Literal["auto"] = Field(
        "auto",
        description="stem for small images (False: for 224x224; auto: by the images, small are "
        "those of up to 64 pixels)",
    )
    dropout_p: Annotated[float, Field(ge=0, lt=1)] | Literal["published"] = Field(
        "published", description="dropout of kernel normalization's statistics"
    )
    options: Options = Field(
        "", description="[model.options]: what a model of your own takes beside the normalizer"
    )
    weights: str = Field(
        "", description="file of weights to start from: safetensors, or tensors that torch saved"
    )
    weights_except: str = Field(
        "", description="tensors that are not taken from it, as 'fc.*, head.*'"
    )
    weights_sha256: str = Field(
        "", description="of that file: filled in when a run begins, and another file is refused"
    )
    frozen: str = Field(
        "", description="tensors that are not trained and not sent, as 'conv1.*, layer1.*'"
    )


class TaskConfig(Section):
    """What the network is trained for: the loss, the metrics, what targets are."""

    name: str = Field(
        "classification",
        description="classification, multilabel, regression, segmentation or package.module:Task",
    )
    options: Options = Field(
        "", description="[task.options]: what the task takes, such as class_weights, loss"
    )


class NormalizerConfig(Section):
    """The normalizer: a layer and a federation rule."""

    name: str = Field(
        "kernel",
        description="kernel, ws_group, group, batch, none, …, or your own: package.module:Class",
    )
    groups: int = Field(0, ge=0, description="group, ws_group: number of groups (0: default)")
    bn_statistics: Literal["averaged", "recalibrated", "local"] = Field(
        "averaged",
        description="batch: running statistics are averaged; recalibrated by every client after "
        "training and pooled; or stay on the client",
    )
    frozen_from: int = Field(
        0, ge=0, description="fixbn: first round on frozen statistics (0: the second half)"
    )
    options: Options = Field(
        "", description="[normalizer.options]: what a normalizer has beside these, as eval_mode"
    )


class TrainConfig(Section):
    """What a client does in one round."""

    batch_size: int = Field(2, ge=1, description="local batch size")
    accumulate: int = Field(
        1, ge=1, description="local batches whose gradients are averaged for one local step"
    )
    local_epochs: int = Field(1, ge=1, description="passes over the client's images in a round")
    local_steps: int = Field(
        0, ge=0, description="at most so many local steps in a round, of the optimizer (0: no cap)"
    )
    learning_rate: Positive = Field(0.05, description="local SGD learning rate")
    momentum: Fraction = Field(0.0, description="local SGD momentum")
    weight_decay: NonNegative = Field(0.0, description="L2 penalty")
    clip_norm: NonNegative = Field(10.0, description="clip the gradient's norm (0: off)")
    adaptive_clip: NonNegative | Literal["published"] = Field(
        "published",
        description="clip the gradient of every unit to this part of its weights' norm (0: off; "
        "published: as the normalizer's paper does, which for most is off)",
    )
    schedule: Literal["constant", "cosine", "exponential"] = Field(
        "constant", description="learning rate over the rounds"
    )
    decay: Annotated[float, Field(gt=0, le=1)] = Field(
        0.998, description="exponential schedule: factor for each round"
    )
    keep_momentum: bool = Field(
        False, description="a client goes on with the momentum of its last round"
    )
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = Field(
        "auto",
        description="what a training step computes in; auto is tf32 on an NVIDIA GPU (products of "
        "convolutions with ten bits of mantissa, PyTorch's own default), float32 elsewhere; "
        "parameters, optimizer, statistics and evaluation stay float32",
    )


class ExperimentConfig(Section):
    """One federated experiment."""

    seed: int = Field(0, ge=0, description="every random draw derives from it")
    rounds: int = Field(15, ge=1, description="rounds of federated training")
    cohort: int = Field(5, ge=1, description="clients that train in a round")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    engine: Literal["auto", "inprocess", "batched", "ray"] = Field(
        "auto", description="what runs the clients of a simulation (docs/engines.md)"
    )
    workers: int = Field(
        0, ge=0, description="processes that train clients (0: one per core); results are the same"
    )
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    normalizer: NormalizerConfig = NormalizerConfig()
    train: TrainConfig = TrainConfig()
    strategy: StrategyConfig = StrategyConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    server: ServerConfig = ServerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observers: ObserversConfig = ObserversConfig()

    @classmethod
    def resolve(cls, *layers: Mapping[str, Any]) -> Self:
        """Return the configuration of the defaults overlaid by each of `layers` in turn.

        A layer maps dotted keys or nested tables to values, strings from a command line among
        them. Raises UserError naming the key, and the nearest valid one where it is unknown.
        """
        flat: dict[str, Any] = {}
        tables = [*option_tables(cls)]
        for layer in layers:
            flat = as_named_now(with_options(tables, flat, layer))
        check_keys(cls, flat)
        config = validated(cls, nest(flat))
        if config.partition.clients and config.cohort > config.partition.clients:
            raise UserError(
                f"cohort ({config.cohort}) is larger than partition.clients "
                f"({config.partition.clients}): lower cohort or raise partition.clients"
            )
        chooses = {"evaluation.patience": config.evaluation.patience}
        chooses["checkpoint.best"] = config.checkpoint.best
        for key, value in chooses.items():
            if value and not config.data.validation_fraction:
                raise UserError(
                    f"{key} chooses on validation images, of which data.validation_fraction = 0 "
                    "leaves none (test images must not choose): raise it"
                )
        return config

    @property
    def chooses(self) -> bool:
        """Whether validation images decide on the round that is the last, or the best."""
        return self.checkpoint.best or self.evaluation.patience > 0

    def flat(self) -> dict[str, Scalar]:
        """Return the configuration as dotted keys: Flower's run config of this experiment."""
        return flattened(self.model_dump())

    def for_nodes(self, count: int) -> Self:
        """Return the configuration for a federation of `count` nodes.

        Where ``partition.clients`` is 0 it becomes `count`; a larger cohort becomes all of them.
        """
        if self.partition.clients:
            return self
        return self.overlay(partition__clients=count, cohort=min(self.cohort, count))

    def overlay(self, **changes: Scalar) -> Self:
        """Return a copy with dotted keys changed; ``__`` stands for the dot in a keyword."""
        return self.resolve(self.flat(), {k.replace("__", "."): v for k, v in changes.items()})


def as_named_now(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted settings with those under earlier names as they are called now."""
    return {_RENAMED.get(key, key): value for key, value in flat.items()}


_RENAMED = {"evaluation.target_accuracy": "evaluation.target"}
