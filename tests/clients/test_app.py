"""The ClientApp, called as Flower calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from clients.app import app
from fedkn.algorithms.fedprox import FedProx
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import build_model, data_summary, federated_data, inputs_of, normalizer_of
from fedkn.federation import (
    arrays_to_tensors,
    data_record,
    is_packed,
    join_request,
    on_the_wire,
    packed,
    tensors_to_arrays,
    unpacked,
)
from fedkn.training import LocalTask, Workspace, train_locally
from simulations.engines.run import run_experiment
from tests.server.fake_grid import ScriptedGrid, run, small

RUN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _server_process():
    ScriptedGrid([], lambda message: [])


def context(config: ExperimentConfig, partition: Any = 2, **run_config: Any) -> Context:
    return Context(
        run_id=1,
        node_id=9,
        node_config={} if partition is None else {"partition-id": partition, "num-partitions": 6},
        state=RecordDict(),
        run_config={**config.flat(), **run_config},
    )


def sent(config: ExperimentConfig, seed: int = 0, **instructions: Any) -> Message:
    """Return a training message with tensors that are not the initial ones."""
    model = build_model(config.overlay(seed=seed + 50))
    rule = normalizer_of(config).federation_rule(model)
    tensors = {name: model.state_dict()[name] for name in on_the_wire(rule)}
    given = {"server-round": 3, "learning-rate": 0.1, "run-token": RUN, "state-round": 0}
    given |= instructions
    told = ConfigRecord({key: value for key, value in given.items() if value is not None})
    images = data_record(data_summary(config))
    content = RecordDict({"arrays": tensors_to_arrays(tensors), "config": told, "data": images})
    return Message(content, dst_node_id=9, message_type=MessageType.TRAIN)


def test_joining_tells_partition_and_size():
    config = small()
    query = Message(
        join_request(data_summary(config)), dst_node_id=9, message_type=MessageType.QUERY
    )
    answer = app(query, context(config, 4))
    labels = federated_data(config).client(4).targets.tolist()
    assert dict(answer.content.metric_records["metrics"]) == {
        "partition-id": 4,
        "num-examples": len(labels),
        "labels": [labels.count(label) for label in range(10)],
    }


def test_joining_with_privacy_does_not_tell_how_many_of_each_class():
    config = small(privacy__mechanism="example", privacy__noise_multiplier=1.0)
    query = Message(
        join_request(data_summary(config)), dst_node_id=9, message_type=MessageType.QUERY
    )
    answer = app(query, context(config, 4))
    assert set(answer.content.metric_records["metrics"]) == {"partition-id", "num-examples"}
    assert set(answer.content) == {"metrics"}


@pytest.mark.parametrize("proximal_mu", [None, 0.5])
@pytest.mark.parametrize("name", ["kernel", "batch", "group"])
def test_training_is_local_training_of_what_was_received(name, proximal_mu):
    algorithm = "fedavg" if proximal_mu is None else "fedprox"
    config = small(normalizer__name=name, strategy__name=algorithm)
    message = sent(config, **{"proximal-mu": proximal_mu})
    reply = app(message, context(config))
    workspace = Workspace(build_model(config))
    workspace.load(arrays_to_tensors(message.content.array_records["arrays"]))
    data = federated_data(config).client(2)
    update = train_locally(
        workspace,
        data.inputs,
        data.targets,
        LocalTask(
            seed=config.seed,
            round_=3,
            client=2,
            train=config.train,
            learning_rate=0.1,
            rules=(FedProx(proximal_mu or 0.0),),
        ),
        inputs=inputs_of(config, torch.device("cpu")),
        normalizer=normalizer_of(config),
    )
    received = arrays_to_tensors(reply.content.array_records["arrays"])
    assert list(received) == list(message.content.array_records["arrays"])
    assert all(torch.equal(value, workspace.state()[key]) for key, value in received.items())
    metrics = reply.content.metric_records["metrics"]
    assert metrics["partition-id"] == 2
    assert metrics["num-examples"] == len(data)
    assert (metrics["trained-examples"], metrics["steps"]) == (update.examples, update.steps)
    assert metrics["train-loss"] == update.loss
    assert reply.metadata.src_node_id == 9


def test_what_was_asked_packed_is_answered_packed():
    config = small()
    plain, message = sent(config), sent(config)
    message.content["arrays"] = packed(message.content.array_records["arrays"])
    answer = app(message, context(config)).content.array_records["arrays"]
    expected = app(plain, context(config)).content.array_records["arrays"]
    assert is_packed(answer)
    assert not is_packed(expected)
    assert [a.data for a in unpacked(answer).values()] == [a.data for a in expected.values()]


def test_batchnorms_counters_do_not_travel():
    config = small(normalizer__name="batch")
    arrays = app(sent(config), context(config)).content.array_records["arrays"]
    assert any(name.endswith("running_var") for name in arrays)
    assert not any(name.endswith("num_batches_tracked") for name in arrays)


def test_the_answer_does_not_depend_on_who_trained_before():
    config = small(normalizer__name="batch")
    alone = app(sent(config), context(config, 1))
    for partition in (0, 5, 3):
        app(sent(config, seed=partition), context(config, partition))
    again = app(sent(config), context(config, 1))
    assert [a.data for a in alone.content.array_records["arrays"].values()] == [
        a.data for a in again.content.array_records["arrays"].values()
    ]


def test_what_was_sent_is_not_touched():
    config = small()
    message = sent(config)
    before = {name: array.data for name, array in message.content.array_records["arrays"].items()}
    app(message, context(config))
    after = {name: array.data for name, array in message.content.array_records["arrays"].items()}
    assert before == after


@pytest.mark.parametrize(
    ("partition", "message"),
    [(None, "no partition-id"), ("2", "no partition-id"), (6, "partition-id 6"), (-1, "-1")],
)
def test_a_node_without_a_partition_of_its_own(partition, message):
    config = small()
    with pytest.raises(UserError, match=message) as error:
        app(sent(config), context(config, partition))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("server-round", None), ("learning-rate", None), ("learning-rate", "fast")],
)
def test_instructions_that_lack_something(key, value):
    config = small()
    with pytest.raises(UserError, match=f"no (int|float) '{key}'"):
        app(sent(config, **{key: value}), context(config))


def test_an_unknown_run_config_key():
    with pytest.raises(UserError, match=r"did you mean 'train\.batch_size'"):
        app(sent(small()), context(small(), **{"train.batchsize": 3}))


@pytest.mark.parametrize("name", ["kernel", "batch"])
def test_the_engine_and_a_plain_grid_end_in_the_same_weights(name):
    config = small(normalizer__name=name, rounds=3, engine="inprocess", workers=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = run(config).weights_sha256
    finally:
        torch.set_num_threads(threads)
    assert run_experiment(config).weights_sha256 == expected
