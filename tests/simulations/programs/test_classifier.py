import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkn.errors import UserError
from simulations.programs.classifier import Card, Classifier

CARD = Card(
    classes=("cat", "dog"),
    channels=1,
    height=8,
    width=6,
    scaling="unit",
    mean=(0.0,),
    deviation=(1.0,),
    run="run",
    cell="cell",
    round=2,
    weights_sha256="0" * 64,
    model="resnet8",
    normalizer="kernel",
    fedkn="0.1.0",
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def test_a_card_comes_back_from_json() -> None:
    assert Card.from_json(CARD.to_json()) == CARD


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from([field.name for field in dataclasses.fields(Card)] + ["more"]),
    value=_JSON,
)
def test_a_card_of_other_types_is_none(name: str, value: object) -> None:
    data = json.loads(CARD.to_json()) | {name: value}
    try:
        card = Card.from_json(json.dumps(data))
    except ValueError:
        return
    # It is what the text says, of the types that are promised.
    assert name != "more"
    assert all(isinstance(of, str) for of in card.classes)
    assert all(0 < side <= 2**14 for side in (card.channels, card.height, card.width))
    assert all(isinstance(of, float) for of in (*card.mean, *card.deviation))
    assert type(card.round) is int


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, '{"classes": 1e999}'])
def test_text_that_is_no_card(text: str) -> None:
    with pytest.raises(ValueError, match=r"Card|fields"):
        Card.from_json(text)


def test_a_model_that_is_not_what_its_card_says() -> None:
    pixels = torch.zeros(3, 1, 8, 6, dtype=torch.uint8)

    def raising(_: torch.Tensor) -> torch.Tensor:
        raise IndexError("out of\nrange")

    with pytest.raises(UserError, match=r"cannot be run on images of \(1, 8, 6\): out of range"):
        Classifier(CARD, raising).logits(pixels)
    with pytest.raises(UserError, match=r"gives \(3, 5\) for 3 images of 2 classes"):
        Classifier(CARD, lambda x: torch.zeros(len(x), 5)).logits(pixels)
