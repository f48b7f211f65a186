"""Local training against a plain PyTorch loop that knows nothing of fedkn's shortcuts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedkn import models, normalizers
from fedkn.algorithms.fedprox import FedProx
from fedkn.algorithms.scaffold import Scaffold
from fedkn.config import TrainConfig
from fedkn.errors import UserError
from fedkn.layers import dropout_stream
from fedkn.normalizers import Normalizer
from fedkn.normalizers.none import NoNormalizer
from fedkn.seeds import derive, torch_generator
from fedkn.training import Inputs, LocalTask, Workspace, plan_batches, train_locally
from fedkn.training.kept_momentum import KeptMomentum

PLAIN = Inputs("unit")
AUGMENTED = Inputs("unit", flip=True, crop_padding=1)
TRAIN = TrainConfig(batch_size=4, local_epochs=2, momentum=0.9, weight_decay=1e-3, clip_norm=1.0)
TASK = LocalTask(seed=3, round_=2, client=1, train=TRAIN, learning_rate=0.05)


class Doubled(Inputs):
    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images).double()


def build(name: str) -> nn.Module:
    return models.build(
        "resnet8",
        num_classes=10,
        in_channels=1,
        normalizer=normalizers.create(name),
        width=4,
        seed=0,
    )


def data(seed: int = 0, size: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (size, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def state_of(workspace: Workspace) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in workspace.state().items()}


def trained(workspace: Workspace, task: LocalTask = TASK, inputs: Inputs = PLAIN, **given):
    """Load the initial state (and what is given), train, and return the state and the report."""
    workspace.load(given.get("state", {}))
    images, labels = given.get("data", data())
    normalizer = normalizers.create(given.get("normalizer", "none"))
    update = train_locally(workspace, images, labels, task, inputs=inputs, normalizer=normalizer)
    return state_of(workspace), update


def naive(
    model: nn.Module, task: LocalTask, normalizer: Normalizer, proximal_mu: float
) -> tuple[dict[str, Tensor], float]:
    images, labels = data()
    train = task.train
    plan = plan_batches(
        len(labels),
        train,
        normalizer.minimum_batch,
        seed=task.seed,
        round_=task.round_,
        client=task.client,
    )
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=task.learning_rate,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
    )
    model.train()
    losses = []
    for step, batch in enumerate(plan.batches):
        with dropout_stream(derive(task.seed, "dropout", task.round_, task.client, step)):
            scores = model((images[batch].float() / 255).double())
        loss = nn.functional.cross_entropy(scores, labels[batch])
        losses += [float(loss.detach())] * len(batch)
        if proximal_mu:
            pairs = zip(model.parameters(), start, strict=True)
            distance = sum((p - s).square().sum() for p, s in pairs)
            loss = loss + proximal_mu / 2 * distance
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
    with torch.no_grad():
        everything = (images.float() / 255).double()
        normalizer.end_training(model, lambda _: model(everything), task.round_)
    return dict(model.state_dict()), sum(losses) / len(losses)


@pytest.mark.parametrize("proximal_mu", [0.0, 0.5])
@pytest.mark.parametrize("name", normalizers.names())
def test_it_is_the_naive_loop(name, proximal_mu):
    task = replace(TASK, rules=(FedProx(proximal_mu),))
    # In double precision: normalizing four nearly equal pixels makes much of float32's rounding.
    workspace = Workspace(build(name).double())
    ours, update = trained(workspace, task, Doubled("unit"), normalizer=name)
    theirs, loss = naive(build(name).double(), task, normalizers.create(name), proximal_mu)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-7, msg=key)
    assert update.loss == pytest.approx(loss, rel=1e-6)
    assert (update.examples, update.steps) == (22, 6)
    assert update.skipped_batches == 0


def test_a_remainder_too_small_is_skipped_and_counted():
    _, update = trained(Workspace(build("batch")), data=data(size=9), normalizer="batch")
    assert (update.examples, update.steps) == (16, 4)
    assert (update.skipped_batches, update.skipped_examples) == (2, 2)


def test_nothing_to_train_on_changes_nothing():
    task = replace(TASK, train=TrainConfig(batch_size=1))
    state, update = trained(Workspace(build("batch")), task, normalizer="batch")
    assert all(torch.equal(state[k], v) for k, v in build("batch").state_dict().items())
    assert (update.examples, update.steps, update.loss) == (0, 0, 0.0)
    assert update.skipped_examples == 11


@pytest.mark.parametrize("name", ["kernel", "batch", "ws_group"])
def test_the_same_task_gives_the_same_bits(name):
    workspace = Workspace(build(name))
    first, _ = trained(workspace, inputs=AUGMENTED)
    again, _ = trained(workspace, inputs=AUGMENTED)
    fresh, _ = trained(Workspace(build(name)), inputs=AUGMENTED)
    assert all(torch.equal(first[k], again[k]) and torch.equal(first[k], fresh[k]) for k in first)


@pytest.mark.parametrize("change", [{"seed": 4}, {"round_": 3}, {"client": 2}])
def test_another_seed_round_or_client_draws_differently(change):
    workspace = Workspace(build("group"))
    one, _ = trained(workspace)
    other, _ = trained(workspace, replace(TASK, **change))
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_dropout_and_augmentation_differ_from_step_to_step_and_client_to_client():
    """With one image, the order of batches cannot be what makes the difference."""
    one_image = data(size=1)
    workspace = Workspace(build("kernel"))
    task = replace(TASK, train=TrainConfig(batch_size=1, local_epochs=1))
    results = {}
    for client in (1, 2):
        state, _ = trained(workspace, replace(task, client=client), data=one_image)
        results[client] = state
    assert any(not torch.equal(results[1][k], results[2][k]) for k in results[1])
    plain, _ = trained(Workspace(build("group")), task, data=one_image)
    shifted = [
        trained(Workspace(build("group")), replace(task, client=c), AUGMENTED, data=one_image)[0]
        for c in range(4)
    ]
    assert any(any(not torch.equal(plain[k], other[k]) for k in plain) for other in shifted)


def test_augmentation_draws_from_the_task_alone():
    torch.manual_seed(0)
    one, _ = trained(Workspace(build("kernel")), inputs=AUGMENTED)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    other, _ = trained(Workspace(build("kernel")), inputs=AUGMENTED)
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(torch.random.get_rng_state(), before)


# -- the workspace --------------------------------------------------------------------------------


class Forgetful(nn.Module):
    """Keeps something between batches that is no part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build("batch")
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.net(x) * (1 + self.seen)


@pytest.mark.parametrize("make", [lambda: build("batch"), lambda: build("kernel"), Forgetful])
def test_nothing_of_one_client_reaches_the_next(make):
    """Not weights, running statistics, counters, momentum, gradients or transient buffers."""
    alone, report_alone = trained(Workspace(make()), replace(TASK, client=2), data=data(2))
    shared = Workspace(make())
    trained(shared, data=data(1))
    images, _ = data(3)
    shared.model(images.float() / 255).sum().backward()  # a client that broke off in mid-step
    after, report = trained(shared, replace(TASK, client=2), data=data(2))
    assert all(torch.equal(alone[k], after[k]) for k in alone)
    assert report.loss == report_alone.loss


def test_load_overlays_states_on_the_initial_one():
    workspace = Workspace(build("batch"))
    initial = state_of(workspace)
    name, other, *_ = (k for k, v in initial.items() if v.dim() == 1)
    one, two = torch.full_like(initial[name], 2.0), torch.full_like(initial[name], 3.0)
    workspace.load({name: one, other: initial[other] + 1}, {name: two})
    state = state_of(workspace)
    assert torch.equal(state[name], two)
    assert torch.equal(state[other], initial[other] + 1)
    assert all(torch.equal(state[k], v) for k, v in initial.items() if k not in (name, other))
    workspace.load()
    assert all(torch.equal(v, initial[k]) for k, v in state_of(workspace).items())


def test_the_state_is_the_models_own():
    workspace = Workspace(build("kernel"))
    expected = workspace.model.state_dict()
    assert list(workspace.state()) == list(expected)
    trained(workspace)
    assert all(torch.equal(v, expected[k]) for k, v in workspace.state().items())


def test_load_refuses_what_does_not_fit():
    workspace = Workspace(build("group"))
    name, value = next(iter(workspace.state().items()))
    with pytest.raises(ValueError, match="no tensors named extra"):
        workspace.load({"extra": value})
    with pytest.raises(ValueError, match=f"'{name}' is \\(1,\\)"):
        workspace.load({name: torch.ones(1)})
    with pytest.raises(ValueError, match=r"torch\.float64, but the model's is"):
        workspace.load({name: value.double()})


def test_the_generators_are_those_of_the_documentation():
    """What an engine of its own must reproduce: shuffle, augment and dropout by name."""
    order = torch.randperm(11, generator=torch_generator(3, "shuffle", 2, 1, 0))
    plan = plan_batches(11, TRAIN, 1, seed=3, round_=2, client=1)
    assert torch.equal(torch.cat(plan.batches[:3]), order)


def test_momentum_that_is_kept_goes_on_where_it_was():
    # Two rounds against one optimizer that lives through both.
    train = TRAIN.model_copy(update={"clip_norm": 0.0})
    first = replace(TASK, train=train, rules=(KeptMomentum(),))
    workspace = Workspace(build("group").double())
    between, update = trained(workspace, first, Doubled("unit"), normalizer="group")
    second = replace(first, round_=3, carried=update.carried)
    after, _ = trained(workspace, second, Doubled("unit"), normalizer="group", state=between)

    model, (images, labels) = build("group").double().train(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for round_ in (2, 3):
        plan = plan_batches(len(labels), train, 1, seed=3, round_=round_, client=1)
        for batch in plan.batches:
            optimizer.zero_grad()
            scores = model((images[batch].float() / 255).double())
            nn.functional.cross_entropy(scores, labels[batch]).backward()
            optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(after[key], value, rtol=1e-6, atol=1e-7, msg=key)


def test_without_keeping_nothing_is_carried():
    _, update = trained(Workspace(build("group")))
    assert not update.carried


def test_a_correction_moves_every_step_by_the_same():
    # One step, no momentum: the corrected step ends the rate times the correction away.
    train = TrainConfig(batch_size=11, clip_norm=1.0)
    task = replace(TASK, train=train)
    correction = {n: torch.randn_like(p) for n, p in build("none").named_parameters()}
    workspace = Workspace(build("none"))
    plain, _ = trained(workspace, task)
    corrected, _ = trained(workspace, replace(task, rules=(Scaffold(),), given=correction))
    for key, value in plain.items():
        torch.testing.assert_close(corrected[key], value - 0.05 * correction[key], msg=key)


class Watched(NoNormalizer):
    """Notes when it is asked to prepare and to complete a model, and looks at all the images."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def begin_training(self, model, round):
        self.calls.append(("begin", round, model.training))

    def end_training(self, model, forward, round):
        seen = []
        handle = model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        forward(4)
        handle.remove()
        self.calls.append(("end", round, torch.cat(seen)))


def test_the_normalizer_prepares_and_completes_the_model_with_all_images():
    normalizer, (images, labels) = Watched(), data()
    workspace = Workspace(build("none"))
    workspace.load()
    train_locally(workspace, images, labels, TASK, inputs=AUGMENTED, normalizer=normalizer)
    begin, (name, round_, seen) = normalizer.calls
    assert begin == ("begin", 2, True)
    assert (name, round_) == ("end", 2)
    assert torch.equal(seen, images.float() / 255)


def _other(model: nn.Module) -> nn.Module:
    """A model with the same tensors by other numbers."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        nn.init.normal_(parameter, std=0.1)
    return twin


def _replaced(model: nn.Module) -> None:
    head = model.head.fc
    head.weight = nn.Parameter(head.weight.detach().clone())


def _new_head(model: nn.Module) -> None:
    model.head.fc = copy.deepcopy(model.head.fc)


def _frozen_and_freed(model: nn.Module) -> None:
    model.requires_grad_(False)
    model.requires_grad_(True)


ORDINARY = {
    "zero_grad": lambda m: m.zero_grad(),
    "cast": lambda m: m.double().float(),
    "assigned": lambda m: m.load_state_dict(_other(m).state_dict(), assign=True),
    "second": Workspace,
    "second, used": lambda m: trained(Workspace(m)),
    "replaced": _replaced,
    "new head": _new_head,
    "frozen and freed": _frozen_and_freed,
    "moved": lambda m: m.to("meta").to_empty(device="cpu"),
    "layout": lambda m: m.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("when", ["before loading", "after loading"])
@pytest.mark.parametrize("name", ["kernel", "batch"])
@pytest.mark.parametrize("call", ORDINARY)
def test_after_an_ordinary_call_on_its_model_a_workspace_trains_on(call, name, when):
    """A task after the call is what it is on a fresh model with the same tensors."""
    workspace = Workspace(build(name))
    state = _other(build(name)).state_dict()
    if when == "before loading":
        ORDINARY[call](workspace.model)
        workspace.load(state)
    else:
        workspace.load(state)
        ORDINARY[call](workspace.model)
        if call == "moved":
            workspace.model.load_state_dict(state)
    start = {k: v.clone() for k, v in workspace.model.state_dict().items()}
    normalizer = normalizers.create(name)
    train_locally(workspace, *data(), TASK, inputs=PLAIN, normalizer=normalizer)
    expected, _ = trained(Workspace(build(name)), state=start, normalizer=name)
    for key, value in workspace.model.state_dict().items():
        if call == "layout":
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(value, expected[key]), key
    now = workspace.model.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in workspace.state().items())
    if call != "layout":
        # And the next client starts from the initial tensors again.
        again, _ = trained(workspace, normalizer=name)
        fresh, _ = trained(Workspace(build(name)), normalizer=name)
        assert all(torch.equal(value, again[key]) for key, value in fresh.items())


@pytest.mark.parametrize("name", normalizers.names())
def test_training_alone_leaves_a_workspace_attached(name):
    """No layer of ours puts a new tensor in the place of one: taking over again costs time."""
    workspace = Workspace(build(name))
    optimizer = workspace.optimizer
    trained(workspace, normalizer=name)
    assert workspace.attached() is optimizer


def test_two_workspaces_on_one_model_take_turns():
    model = build("none")
    first, second = Workspace(model), Workspace(model)
    expected, _ = trained(Workspace(build("none")))
    for workspace in (first, second, first, second):
        assert all(torch.equal(v, expected[k]) for k, v in trained(workspace)[0].items())


def test_a_frozen_layer_stays_and_a_freed_one_learns():
    workspace = Workspace(build("none"))
    workspace.load()
    head = workspace.model.head.fc
    before = head.weight.detach().clone()
    head.requires_grad_(False)
    train = TRAIN.model_copy(update={"weight_decay": 0.1})
    for frozen in (True, False):
        head.requires_grad_(not frozen)
        train_locally(
            workspace,
            *data(),
            replace(TASK, train=train),
            inputs=PLAIN,
            normalizer=normalizers.create("none"),
        )
        assert torch.equal(head.weight, before) == frozen


def test_a_buffer_that_is_no_part_of_the_state_and_was_replaced():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)
            self.register_buffer("calls", torch.zeros(1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1  # not in place
            out: Tensor = self.fc(x.flatten(1))
            return out

    workspace = Workspace(Counting())
    for _ in range(2):
        trained(workspace)
        assert workspace.model.calls == 6
    workspace.load()
    assert workspace.model.calls == 0


def test_a_model_that_became_another_is_refused():
    workspace = Workspace(build("none"))
    workspace.model.head.fc = nn.Linear(16, 7)
    for _ in range(2):
        with pytest.raises(UserError, match=r"head\.fc\.weight.*make a new Workspace"):
            workspace.load()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: build("none").requires_grad_(False), "no parameter to train"),
        (lambda: nn.Sequential(nn.LazyConv2d(3, 3)), "send a batch through the model"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "'1.weight' is torch.f"),
    ],
)
def test_what_cannot_be_trained_says_why(model, words):
    with pytest.raises(UserError, match=words):
        Workspace(model())


def test_momentum_survives_being_taken_over():
    """Two tasks without a load in between, the second after a cast, are two without the cast."""
    found = []
    for call in (lambda m: None, lambda m: m.double().float()):
        workspace = Workspace(build("none"))
        workspace.load()
        for _ in range(2):
            train_locally(
                workspace, *data(), TASK, inputs=PLAIN, normalizer=normalizers.create("none")
            )
            call(workspace.model)
        found.append(state_of(workspace))
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())
