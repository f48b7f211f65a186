"""Every metric against scikit-learn or a naive float64, whatever the batches and their order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import Tensor

from fedkn.tasks import Classification, Multilabel, Regression, Segmentation, Task

IGNORED = 255


def whole(task: Task, outputs: Tensor, targets: Tensor, cuts: list[int]) -> dict[str, Tensor]:
    """Return the sums over the parts between `cuts`, added from the last part to the first."""
    edges = [0, *sorted(cut % (len(outputs) + 1) for cut in cuts), len(outputs)]
    parts = [task.sums(outputs[a:b], targets[a:b]) for a, b in itertools.pairwise(edges) if a < b]
    sums = parts[-1]
    for part in reversed(parts[:-1]):
        sums = {name: sums[name] + part[name] for name in sums}
    assert {of.dtype for of in sums.values()} <= {torch.int64, torch.float64}
    return sums


def classified(seed: int, n: int, classes: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=draw), torch.randint(classes, (n,), generator=draw)


CUTS = st.lists(st.integers(0, 60), max_size=4)
SEED = st.integers(0, 10_000)


def agree(found: float, wanted: float) -> None:
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12, nan_ok=True)


@given(seed=SEED, n=st.integers(1, 60), classes=st.integers(2, 6), cuts=CUTS)
@settings(max_examples=40, deadline=None)
def test_classification(seed: int, n: int, classes: int, cuts: list[int]) -> None:
    task = Classification()
    outputs, targets = classified(seed, n, classes)
    sums = whole(task, outputs, targets, cuts)
    found, predicted = task.values(sums), outputs.argmax(1)
    agree(found["accuracy"], sk.accuracy_score(targets, predicted))
    agree(found["macro_f1"], sk.f1_score(targets, predicted, average="macro"))
    counts = task.confusion(sums)
    assert counts is not None
    assert np.array_equal(counts, sk.confusion_matrix(targets, predicted, labels=range(classes)))
    of_class = task.by_class(sums)
    recall = sk.recall_score(
        targets, predicted, labels=range(classes), average=None, zero_division=math.nan
    )
    for one, other in zip(of_class["accuracy"], recall, strict=True):
        agree(one, other)


def test_of_many_classes_no_pairs_are_counted_and_the_figures_are_the_same() -> None:
    task = Classification()
    outputs, targets = classified(3, 5000, 201)
    sums = whole(task, outputs, targets, [100, 1000])
    assert task.confusion(sums) is None
    found, predicted = task.values(sums), outputs.argmax(1)
    agree(found["accuracy"], sk.accuracy_score(targets, predicted))
    agree(found["macro_f1"], sk.f1_score(targets, predicted, average="macro"))


@given(seed=SEED, n=st.integers(1, 60), labels=st.integers(1, 5), cuts=CUTS)
@settings(max_examples=40, deadline=None)
def test_multilabel(seed: int, n: int, labels: int, cuts: list[int]) -> None:
    task = Multilabel()
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(n, labels, generator=draw)
    targets = torch.randint(2, (n, labels), generator=draw).float()
    sums = whole(task, outputs, targets, cuts)
    found = task.values(sums)
    wanted, predicted = targets.long().numpy(), (outputs > 0).long().numpy()
    both = wanted.ravel(), predicted.ravel()
    agree(found["micro_f1"], sk.f1_score(*both, zero_division=math.nan))
    agree(found["subset_accuracy"], float((wanted == predicted).all(1).mean()))
    each = [
        sk.f1_score(wanted[:, k], predicted[:, k], zero_division=math.nan) for k in range(labels)
    ]
    for one, other in zip(task.by_class(sums)["f1"], each, strict=True):
        agree(one, other)
    defined = [value for value in each if not math.isnan(value)]
    agree(found["macro_f1"], float(np.mean(defined)) if defined else math.nan)


@given(
    seed=SEED,
    n=st.integers(1, 60),
    numbers=st.integers(1, 3),
    cuts=CUTS,
    centre=st.sampled_from([0.0, 1e4, -3e6, 1e-30]),
)
@settings(max_examples=60, deadline=None)
def test_regression(seed: int, n: int, numbers: int, cuts: list[int], centre: float) -> None:
    task = Regression()
    draw = torch.Generator().manual_seed(seed)
    targets = (torch.randn(n, numbers, generator=draw, dtype=torch.float64) + centre).float()
    outputs = (targets.double() + torch.randn(n, numbers, generator=draw)).float()
    sums = whole(task, outputs, targets, cuts)
    found = task.values(sums)
    wanted, predicted = targets.double().numpy(), outputs.double().numpy()
    agree(found["rmse"], math.sqrt(sk.mean_squared_error(wanted, predicted)))
    agree(found["mae"], sk.mean_absolute_error(wanted, predicted))
    if n > 1:
        agree(found["r2"], sk.r2_score(wanted, predicted))
    else:
        assert math.isnan(found["r2"])


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_one_number_for_each_example_with_or_without_an_axis(shape: tuple[int, ...]) -> None:
    targets = torch.arange(7.0).reshape(shape)
    outputs = targets.reshape(7, 1) + torch.tensor([[1.0], [-1], [0], [2], [0], [1], [0]])
    task = Regression()
    found = task.values(task.sums(outputs, targets))
    agree(found["rmse"], 1.0)
    agree(task.losses(outputs, targets)[3].item(), 4.0)


def test_variance_is_exact_where_a_difference_of_sums_would_lose_it() -> None:
    """Sixteen million examples' sums of squares in float64 would lose the whole variance."""
    targets = torch.tensor([8388607.0, 8388608.0, 8388607.5] * 4)
    outputs = targets + 0.25
    task = Regression()
    sums = task.sums(outputs[:1], targets[:1])
    for i in range(1, len(targets)):
        sums = {
            k: v + task.sums(outputs[i : i + 1], targets[i : i + 1])[k] for k, v in sums.items()
        }
    many = {"examples": sums["examples"] * 10**6, "squares": sums["squares"] * 1e6}
    many |= {"sizes": sums["sizes"] * 1e6, "targets": sums["targets"] * 10**6}
    wanted, predicted = targets.double().numpy(), outputs.double().numpy()
    agree(task.values(many)["r2"], sk.r2_score(wanted - 8388608.0, predicted - 8388608.0))


@pytest.mark.parametrize("value", [0.0, 1e-45, 3.4e38, -1.17549435e-38, 7.0])
def test_every_float_is_summed_exactly(value: float) -> None:
    targets = torch.tensor([value, -value, value], dtype=torch.float32)
    task = Regression()
    found = task.values(task.sums(torch.zeros(3, 1), targets))
    numbers = targets.double()
    varied = float((numbers - numbers.mean()).square().sum())
    if varied:
        agree(found["r2"], 1 - float(numbers.square().sum()) / varied)
    assert found["r2"] == sk.r2_score([0.0] * 3, [0.0] * 3) if not value else True


def test_targets_that_do_not_vary() -> None:
    task, targets = Regression(), torch.full((4,), 2.5)
    for outputs, wanted in ((targets, 1.0), (targets + 1, 0.0)):
        assert task.values(task.sums(outputs[:, None], targets))["r2"] == wanted
        assert sk.r2_score(targets, outputs) == wanted


@given(seed=SEED, n=st.integers(1, 12), classes=st.integers(2, 4), cuts=CUTS)
@settings(max_examples=40, deadline=None)
def test_segmentation(seed: int, n: int, classes: int, cuts: list[int]) -> None:
    task = Segmentation()
    draw = torch.Generator().manual_seed(seed)
    outputs = torch.randn(n, classes, 4, 5, generator=draw)
    targets = torch.randint(classes, (n, 4, 5), generator=draw)
    targets[torch.rand(n, 4, 5, generator=draw) < 0.2] = IGNORED
    sums = whole(task, outputs, targets, cuts)
    found, of_class = task.values(sums), task.by_class(sums)
    known = targets != IGNORED
    wanted, predicted = targets[known], outputs.argmax(1)[known]
    average = {"labels": range(classes), "average": None}
    iou = sk.jaccard_score(wanted, predicted, zero_division=0, **average)
    dice = sk.f1_score(wanted, predicted, zero_division=math.nan, **average)
    for k in range(classes):
        if not math.isnan(dice[k]):
            agree(of_class["iou"][k], iou[k])
        agree(of_class["dice"][k], dice[k])
    agree(found["mean_iou"], float(iou[~np.isnan(dice)].mean()))
    agree(found["mean_dice"], float(np.nanmean(dice)))
    agree(found["pixel_accuracy"], sk.accuracy_score(wanted, predicted))
    counts = task.confusion(sums)
    assert counts is not None
    assert np.array_equal(counts, sk.confusion_matrix(wanted, predicted, labels=range(classes)))


def test_masks_of_which_every_pixel_is_ignored_have_no_figures_and_no_loss() -> None:
    task, outputs = Segmentation(), torch.randn(2, 3, 4, 4, requires_grad=True)
    targets = torch.full((2, 4, 4), IGNORED)
    assert all(math.isnan(v) for v in task.values(task.sums(outputs, targets)).values())
    loss = task.mean_loss(outputs, targets)
    loss.backward()
    assert loss.item() == 0
    assert not outputs.grad.any()


LOSSES: dict[str, tuple[Task, Callable[[], tuple[Tensor, Tensor]]]] = {
    "classification": (Classification(), lambda: classified(0, 5, 3)),
    "weighted": (Classification([1.0, 0.0, 2.5]), lambda: classified(0, 5, 3)),
    "multilabel": (Multilabel(), lambda: (torch.randn(5, 3), (torch.randn(5, 3) > 0).float())),
    **{
        loss: (Regression(loss), lambda: (torch.randn(5, 2), torch.randn(5, 2)))
        for loss in ("mse", "mae", "huber")
    },
    "segmentation": (
        Segmentation(IGNORED, [1.0, 2.0]),
        lambda: (torch.randn(3, 2, 4, 4), torch.tensor([0, 1, IGNORED, 1]).repeat(3, 4, 1)),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_each_examples_own_and_has_its_gradient(name: str) -> None:
    torch.manual_seed(0)
    task, make = LOSSES[name]
    outputs, targets = make()
    outputs = outputs.double().requires_grad_()
    losses = task.losses(outputs, targets)
    assert losses.shape == (len(outputs),)
    alone = [task.losses(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(outputs))]
    torch.testing.assert_close(torch.cat(alone), losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(task.mean_loss(outputs, targets), losses.mean(), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda x: task.mean_loss(x, targets), (outputs,))


def test_losses_are_what_their_names_say() -> None:
    p, t = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    assert Regression("mse").losses(p, t).item() == (4 + 0.25) / 2
    assert Regression("mae").losses(p, t).item() == (2 + 0.5) / 2
    assert Regression("huber").losses(p, t).item() == ((2 - 0.5) + 0.125) / 2
    assert Regression("huber", delta=2.0).losses(p, t).item() == (2.0 + 0.125) / 2
    outputs, targets = classified(5, 6, 3)
    naive = -outputs.double().log_softmax(1)[range(6), targets]
    weights = torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)
    found = Classification([1.0, 0.5, 3.0]).losses(outputs.double(), targets)
    torch.testing.assert_close(found, naive * weights[targets], rtol=1e-12, atol=0)
    y = (outputs > 0.3).float()
    q = outputs.double().sigmoid()
    naive = -(y * q.log() + (1 - y) * (1 - q).log()).mean(1)
    torch.testing.assert_close(Multilabel().losses(outputs.double(), y), naive, rtol=1e-12, atol=0)


def test_without_weights_the_mean_loss_of_classes_is_one_fused_call() -> None:
    outputs, targets = classified(1, 7, 4)
    wanted = torch.nn.functional.cross_entropy(outputs, targets)
    assert torch.equal(Classification().mean_loss(outputs, targets), wanted)


def test_weights_that_were_first_used_in_inference_can_be_trained_with() -> None:
    task = Classification([1.0, 2.0, 0.5])
    outputs, targets = classified(1, 7, 3)
    with torch.inference_mode():
        task.losses(outputs, targets)
    outputs.requires_grad_()
    task.mean_loss(outputs, targets).backward()
    assert outputs.grad.any()
