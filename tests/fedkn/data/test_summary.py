from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkn.data.examples import Examples
from fedkn.data.fingerprint import Fingerprint
from fedkn.data.summary import DataSummary
from fedkn.errors import UserError
from fedkn.federation import join_request, told_data

NAMES = ("ape", "bee", "cat", "dog", "eel")
WANTED = DataSummary(NAMES, (2, 3, 4))


def images(classes, labels, shape=(2, 3, 4)) -> Examples:
    pixels = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, *shape).to(torch.uint8)
    return Examples(pixels, torch.tensor(labels), tuple(classes))


@given(st.data())
def test_labels_go_by_the_names_of_the_classes(draw):
    own = draw.draw(
        st.permutations(NAMES).flatmap(lambda p: st.integers(1, 5).map(lambda n: p[:n]))
    )
    labels = draw.draw(st.lists(st.integers(0, len(own) - 1), min_size=1, max_size=8))
    data = images(own, labels)
    found = WANTED.conformed(data)
    assert found.classes == NAMES
    assert [NAMES[label] for label in found.targets] == [own[label] for label in labels]
    assert torch.equal(found.inputs, data.inputs)


def test_what_is_strange_is_refused_naming_both_lists():
    with pytest.raises(UserError) as caught:
        WANTED.conformed(images(("ape", "yak", "cat"), [0, 1]))
    text = str(caught.value)
    assert "has classes that the experiment lacks: yak." in text
    assert "The experiment's are ape, bee, cat, dog, eel; those here are ape, yak, cat" in text
    many = DataSummary(tuple(f"class {n}" for n in range(100)), (2, 3, 4))
    with pytest.raises(UserError, match=r"class 19, … 80 more; those here"):
        many.conformed(images(("ape", "bee"), [0]))


@pytest.mark.parametrize(
    ("shape", "named"),
    [((1, 3, 4), r"1 channel\(s\), but the experiment 2"), ((2, 4, 3), "4x3 .* of 3x4")],
)
def test_other_shapes_are_refused(shape, named):
    with pytest.raises(UserError, match=named):
        WANTED.conformed(images(NAMES, [0], shape))


def told(**changes) -> DataSummary:
    data = images(NAMES, [0, 1, 2, 3, 4, 0])
    settings = {
        "classes": NAMES,
        "shape": (2, 3, 4),
        "mean": (0.25, 1 / 3),
        "deviation": (0.5, 0.125),
        "fingerprint": Fingerprint.of(data, data.select(np.arange(2)), data),
    }
    return DataSummary(**(settings | changes))


@pytest.mark.parametrize("summary", [told(), WANTED])
def test_a_summary_comes_back_from_its_record(summary):
    record = json.loads(json.dumps(summary.to_record()))
    assert DataSummary.from_record(record) == summary
    assert DataSummary.from_record(summary.to_record()) == summary


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": None},
        {"classes": ["a", 2]},
        {"shape": []},
        {"shape": [1, 2, 3, 4, 5]},
        {"shape": [2, 3, True]},
        {"dtype": "float8"},
        {"dtype": ["uint8"]},
        {"target_dtype": "uint8"},
        {"target_shape": [0]},
        {"classes": ["a"]},
        {"mean": [0.5]},
        {"fingerprint": {}},
        {"fingerprint": "none"},
    ],
)
def test_what_is_no_record_is_refused(changes):
    with pytest.raises(ValueError, match=r"it|fingerprint"):
        DataSummary.from_record(told().to_record() | changes)


def test_changes_are_named():
    renamed = told(classes=("ape", "bee", "dog", "cat", "eel"))
    assert told().changes(renamed) == [
        "class names (ape, bee, cat, dog, eel; now ape, bee, dog, cat, eel)"
    ]
    assert told().changes(told(shape=(2, 4, 3))) == ["shape of the images (2x3x4, now 2x4x3)"]
    other = images(NAMES, [0, 1, 2, 3, 4, 1])
    relabelled = Fingerprint.of(other, other.select(np.arange(2)), other)
    assert told().changes(told(fingerprint=relabelled)) == ["labels"]
    # Nothing is said of what nobody told, nor of figures that follow from the images.
    assert told().changes(told(fingerprint=None, mean=(), deviation=())) == []


def test_names_from_outside_are_shown_on_one_line():
    (found,) = told().changes(told(classes=("ape\n\x1b[31m", *NAMES[1:])))
    assert "\n" not in found
    assert "\x1b" not in found


def test_the_identity_tells_data_apart():
    assert told().identity == told(mean=(), deviation=()).identity
    others = [told(classes=NAMES[::-1]), told(shape=(2, 4, 3)), told(fingerprint=None)]
    assert len({one.identity for one in (told(), *others)}) == 4
    assert re.fullmatch("[0-9a-f]{12}", told().identity)


@pytest.mark.parametrize(
    ("inputs", "targets", "classes"),
    [
        (torch.zeros(3, 5), torch.zeros(3), ()),
        (torch.zeros(3, 2, 9, dtype=torch.float64), torch.zeros(3, 4), ("a", "b", "c", "d")),
        (torch.zeros(3, 1, 2, 3, 4), torch.tensor([0, 1, 1]), ("a", "b")),
        (torch.zeros(3, 1, 4, 4, dtype=torch.int16), torch.ones(3, 4, 4).long(), ("a", "b")),
    ],
)
def test_of_any_data_a_summary_comes_back_and_they_conform(inputs, targets, classes):
    data = Examples(inputs, targets, classes)
    summary = DataSummary.of(data, fingerprint=Fingerprint.of(data))
    assert DataSummary.from_record(json.loads(json.dumps(summary.to_record()))) == summary
    assert told_data(join_request(summary)) == summary
    assert summary.conformed(data) is data
    wider = Examples(inputs.double() if inputs.dtype != torch.float64 else inputs.float(), targets)
    with pytest.raises(UserError, match=r"has inputs of float|has none"):
        summary.conformed(wider)
    with pytest.raises(UserError, match=r"has other targets|has none"):
        summary.conformed(Examples(inputs, torch.zeros(3, 7)))


def test_columns_and_pixels_go_by_the_names_of_the_classes():
    wanted = DataSummary(("a", "b", "c"), (2,), (), (), None, "float32", "float32", (3,))
    own = Examples(torch.zeros(2, 2), torch.tensor([[1.0, 0], [0, 1]]), ("c", "a"))
    assert wanted.conformed(own).targets.tolist() == [[0, 0, 1], [1, 0, 0]]
    masks = torch.tensor([[[0, 1], [255, -1]]])
    pixels = Examples(torch.zeros(1, 1, 2, 2), masks, ("c", "a"))
    wanted = DataSummary(("a", "b", "c"), (1, 2, 2), (), (), None, "float32", "int64", (2, 2))
    assert wanted.conformed(pixels).targets.tolist() == [[[2, 0], [255, -1]]]
