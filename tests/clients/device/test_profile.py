"""What a device can bear, as the ClientApp takes it into account."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clients.app import app
from clients.device.profile import (
    MIB,
    Profile,
    fitting_batch,
    is_out_of_memory,
    node_profile,
    step_bytes,
)
from clients.session import open_session
from clients.trainer import SequentialTrainer
from fedkn.config import TrainConfig
from fedkn.errors import UserError
from fedkn.federation import arrays_to_tensors
from fedkn.tasks import CLASSIFICATION
from fedkn.training import LocalTask, Workspace
from fedkn.training.inputs import Inputs
from tests.clients.device.conftest import device_context
from tests.clients.test_app import sent
from tests.server.fake_grid import ScriptedGrid, small


@pytest.fixture(autouse=True)
def _server_process():
    ScriptedGrid([], lambda message: [])


def metrics_of(config, **node_config):
    reply = app(sent(config), device_context(config, **node_config))
    return dict(reply.content.metric_records["metrics"])


def test_a_profile_only_lowers():
    config = small(train__batch_size=4, train__local_steps=10, train__precision="bfloat16")
    limited = Profile(local_steps=3, float32=True).limited(config).train
    assert (limited.local_steps, limited.precision) == (3, "float32")
    assert Profile(batch_size=8, local_steps=30).limited(config) == config
    assert Profile(float32=True).limited(small()) == small()
    assert [Profile(batch_size=n).largest_batch(4) for n in (0, 2, 8)] == [4, 2, 4]
    assert Profile().limited(config) == config
    uncapped = small(train__local_steps=0)
    assert Profile(local_steps=3).limited(uncapped).train.local_steps == 3


def test_simulated_nodes_have_none():
    assert node_profile({"partition-id": 0, "num-partitions": 2}) is None
    assert node_profile({"device-name": "a"}) == Profile()
    assert node_profile({"memory-limit": 64}) == Profile(memory_limit=64)
    with pytest.raises(UserError, match="batch_size = -1"):
        node_profile({"batch-size": -1})


def test_the_update_tells_which_batches_it_used():
    config = small(train__batch_size=4, train__accumulate=2, train__local_steps=0)
    asked, small_batches = metrics_of(config), metrics_of(config, batch_size=3)
    assert (asked["batch-size"], small_batches["batch-size"]) == (0, 3)
    examples = asked["num-examples"]
    # The steps are those asked for: FedNova divides by them.
    assert asked["steps"] == small_batches["steps"] == -(-examples // 8)
    assert asked["trained-examples"] == small_batches["trained-examples"] == examples
    assert metrics_of(config, local_steps=3, device_name="a")["steps"] == 3


def test_smaller_batches_make_the_update_that_was_asked_for():
    config = small(train__batch_size=5)
    message = sent(config, **{"learning-rate": 0.02})
    whole, *divided = (
        arrays_to_tensors(
            app(message, device_context(config, **profile)).content.array_records["arrays"]
        )
        for profile in ({}, {"batch_size": 2}, {"batch_size": 1})
    )
    for other in divided:
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_device_may_keep_to_float32():
    config = small(train__precision="bfloat16")
    low, full = (
        open_session(device_context(config, **profile), None)[0].config.train.precision
        for profile in ({"device_name": "a"}, {"float32": True})
    )
    assert (low, full) == ("bfloat16", "float32")


def test_out_of_memory_halves_the_batch_and_starts_again_from_what_was_received():
    # Few steps: a difference of rounding is 2e-6 after 8 of these, 0.03 after 26.
    config = small(train__batch_size=8, train__local_steps=4)
    device = device_context(config, device_name="a")
    session, partition = open_session(device, None)
    state = {n: t + 0.1 for n, t in session.workspace.state().items() if t.is_floating_point()}

    def train(largest, fails_above=None):
        task = LocalTask(
            seed=0,
            round_=1,
            client=partition,
            train=config.train,
            learning_rate=0.1,
            largest_batch=largest,
        )
        steps = []

        def step(module, inputs):
            steps.append(len(inputs[0]))
            # The second step, so that the first one's traces must vanish. PyTorch's own error.
            if fails_above and len(inputs[0]) > fails_above and len(steps) > 1:
                torch.empty(2**60, dtype=torch.uint8)

        hook = session.workspace.model.register_forward_pre_hook(step)
        try:
            update, after = SequentialTrainer().train(session, task, state)
        finally:
            hook.remove()
        return update, {name: tensor.clone() for name, tensor in after.items()}

    direct, wanted = train(2)
    update, found = train(8, fails_above=2)
    assert update.batch_size == 2
    assert (update.steps, update.loss) == (direct.steps, direct.loss)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    plain, whole = train(8)
    assert (plain.batch_size, plain.steps) == (0, update.steps)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    with pytest.raises(UserError, match="does not suffice for a step on 1 image"):
        train(8, fails_above=0.5)


def test_a_simulation_keeps_its_batch_size():
    config = small(train__batch_size=8)
    session, partition = open_session(device_context(config), None)

    def fail(module, inputs):
        raise MemoryError

    hook = session.workspace.model.register_forward_pre_hook(fail)
    task = LocalTask(seed=0, round_=1, client=partition, train=config.train, learning_rate=0.1)
    with pytest.raises(MemoryError):
        SequentialTrainer().train(session, task, {})
    hook.remove()


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.cuda.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(OSError("out of memory"))


def test_memory_of_a_step_is_model_gradients_and_activations():
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 5000, bias=False), nn.Linear(5000, 2))
    image, workspace = torch.zeros(1, 1, 10, 10, dtype=torch.uint8), Workspace(model)
    weights = 4 * (100 * 5000 + 5000 * 2 + 2)

    def held(batch_size, momentum=0.0):
        train = TrainConfig(momentum=momentum)
        example = image, torch.zeros(1, dtype=torch.int64)
        return step_bytes(
            workspace, Inputs("unit"), example, batch_size, train=train, goal=CLASSIFICATION
        )

    # The weights' gradient is made beside the one it is added to.
    assert 2.9 * weights <= held(1) <= 3.2 * weights
    assert held(1, momentum=0.9) - held(1) == weights
    # Where activations are the larger part: 5000 hidden values and their gradients, the input.
    growth = (held(800) - held(400)) / 400
    assert 4 * (2 * 5000 + 100) <= growth <= 4 * (2 * 5000 + 3 * 100)


@pytest.mark.parametrize(("limit", "size"), [(1160, 32), (1159, 16), (440, 8), (120, 1)])
def test_the_largest_half_that_fits(limit, size):
    measured = []

    def bytes_of(batch):
        measured.append(batch)
        return 100 + 20 * batch if batch <= 4 else 200 + 30 * batch

    assert fitting_batch(bytes_of, 32, least=1, limit=limit) == size
    assert max(measured) <= 2 * size


def test_the_smallest_batch_of_the_normalizer_must_fit():
    assert fitting_batch(lambda n: 10 * n, 24, least=3, limit=30) == 3
    with pytest.raises(UserError, match=r"on 3 image\(s\) holds 2.0 MiB.*memory_limit is 1:"):
        fitting_batch(lambda n: 2 * MIB, 24, least=3, limit=MIB)


def test_the_memory_limit_chooses_the_batch_before_training():
    config = small(train__batch_size=64, model__width=16)
    roomy, _ = open_session(device_context(config, memory_limit=1000), None)
    assert roomy.largest_batch == 64

    def held(batch_size):
        example = roomy.examples[:1], roomy.targets[:1]
        return step_bytes(
            roomy.workspace,
            roomy.inputs,
            example,
            batch_size,
            train=config.train,
            goal=CLASSIFICATION,
        )

    limit = -(-held(8) // MIB)
    tight, _ = open_session(device_context(config, memory_limit=limit), None)
    size = tight.largest_batch
    assert 8 <= size < 64
    assert held(size) <= limit * MIB < held(2 * size)


PRIVATE = {"privacy__mechanism": "example", "privacy__noise_multiplier": 1.0}


def test_private_training_bears_whatever_one_image_needs():
    """Images go through the model one at a time: smaller batches would be no relief."""
    config = small(**PRIVATE, train__batch_size=64, train__local_steps=2)
    plain, low = metrics_of(config), metrics_of(config, batch_size=2)
    assert (low["batch-size"], low["epsilon"]) == (0, plain["epsilon"])
    session, _ = open_session(device_context(config, memory_limit=1), None)
    assert session.largest_batch == 64
    wide = small(**PRIVATE, model__width=64)
    with pytest.raises(UserError, match=r"on 1 image\(s\) holds"):
        open_session(device_context(wide, memory_limit=1), None)


def test_private_training_out_of_memory_is_not_tried_again():
    config = small(**PRIVATE, train__batch_size=8)
    session, partition = open_session(device_context(config, device_name="a"), None)
    task = LocalTask(0, 1, partition, config.train, 0.1)
    tries = []

    def step(module, inputs):
        tries.append(len(inputs[0]))
        torch.empty(2**60, dtype=torch.uint8)

    hook = session.workspace.model.register_forward_pre_hook(step)
    try:
        with pytest.raises(UserError, match="does not suffice for a step on 1 image"):
            SequentialTrainer().train(session, task, {})
    finally:
        hook.remove()
    assert len(tries) == 1
