from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkn.data.images import ImageData
from fedkn.data.summary import DataSummary
from fedkn.errors import UserError

NAMES = ("ape", "bee", "cat", "dog", "eel")
WANTED = DataSummary(NAMES, (2, 3, 4))


def images(classes, labels, shape=(2, 3, 4)) -> ImageData:
    pixels = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, *shape).to(torch.uint8)
    return ImageData(pixels, torch.tensor(labels), tuple(classes))


@given(st.data())
def test_labels_go_by_the_names_of_the_classes(draw):
    own = draw.draw(
        st.permutations(NAMES).flatmap(lambda p: st.integers(1, 5).map(lambda n: p[:n]))
    )
    labels = draw.draw(st.lists(st.integers(0, len(own) - 1), min_size=1, max_size=8))
    data = images(own, labels)
    found = WANTED.conformed(data)
    assert found.classes == NAMES
    assert [NAMES[label] for label in found.labels] == [own[label] for label in labels]
    assert torch.equal(found.images, data.images)


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
