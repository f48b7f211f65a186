from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from fedkn.data.examples import Examples, Origins
from fedkn.data.fingerprint import Fingerprint

CLASSES = ("cat", "dog", "owl")


def images(seed: int, count: int) -> Examples:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3, 4, 5), dtype=np.uint8)
    return Examples(torch.from_numpy(pixels), torch.from_numpy(rng.integers(0, 3, count)), CLASSES)


PARTS = (images(1, 9), images(2, 4), images(3, 5))
THEN = Fingerprint.of(*PARTS)


def changed(which: int, **changes) -> Fingerprint:
    """Return the fingerprint of `PARTS` with one of them changed."""
    parts = list(PARTS)
    own = parts[which]
    parts[which] = Examples(
        changes.get("images", own.inputs), changes.get("labels", own.targets), CLASSES
    )
    return Fingerprint.of(*parts)


def naive(digests: list[bytes]) -> str:
    whole = hashlib.sha256()
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


def test_every_digest_is_sha256_of_what_the_description_says():
    own = [
        [
            hashlib.sha256(bytes(image.flatten().tolist())).digest()
            + int(label).to_bytes(8, "little")
            for image, label in zip(part.inputs, part.targets, strict=True)
        ]
        for part in PARTS
    ]
    every = sorted(digest for digests in own for digest in digests)
    assert [THEN.training, THEN.validation, THEN.test] == [naive(digests) for digests in own]
    assert THEN.labelled == naive(every)
    assert THEN.images == naive(sorted(digest[:32] for digest in every))
    assert THEN.counts == (9, 4, 5)


def test_equal_images_have_equal_fingerprints_however_they_lie_in_memory():
    turned = PARTS[0].inputs.to(memory_format=torch.channels_last)
    assert not turned.is_contiguous()
    assert changed(0, images=turned) == THEN
    assert THEN.changes(THEN) == []


def test_one_pixel_is_noticed_in_every_part():
    for which, name in enumerate(("training", "validation", "test")):
        for at in (0, -1):
            other = PARTS[which].inputs.clone()
            other.view(-1)[at] ^= 1
            assert THEN.changes(changed(which, images=other)) == [f"{name} images"]


def test_one_label_is_noticed_in_every_part():
    for which in range(3):
        labels = PARTS[which].targets.clone()
        labels[-1] = (labels[-1] + 1) % 3
        assert THEN.changes(changed(which, labels=labels)) == ["labels"]


def test_labels_that_change_places_are_noticed():
    """As many of each class as before, and as many in each part."""
    labels = PARTS[0].targets
    at = int((labels != labels[0]).nonzero()[0])
    swapped = labels.clone()
    swapped[0], swapped[at] = labels[at], labels[0]
    assert THEN.changes(changed(0, labels=swapped)) == ["labels"]


def test_another_order_and_another_division_are_told_from_other_images():
    order = torch.arange(9).flip(0)
    (found,) = THEN.changes(
        changed(0, images=PARTS[0].inputs[order], labels=PARTS[0].targets[order])
    )
    assert found.startswith("order")
    (found,) = THEN.changes(Fingerprint.of(PARTS[1], PARTS[0], PARTS[2]))
    assert found.startswith("order")


def test_added_and_removed_images_are_counted():
    assert THEN.changes(Fingerprint.of(PARTS[0].select(np.arange(8)), *PARTS[1:])) == [
        "training images (9, now 8)"
    ]
    assert THEN.changes(Fingerprint.of(PARTS[0], PARTS[1], images(4, 6))) == [
        "test images (5, now 6)"
    ]


def test_images_alone_are_the_training_images():
    alone = Fingerprint.of(PARTS[0])
    assert alone.counts == (9, 0, 0)
    assert alone.training == THEN.training


def test_it_comes_back_from_json():
    assert Fingerprint.from_json(THEN.to_json()) == THEN
    assert "\n" not in THEN.to_json()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.pop("test"),
        lambda data: data.update(more=1),
        lambda data: data.update(test="g" * 64),
        lambda data: data.update(test=7),
        lambda data: data.update(counts=[1, 2]),
        lambda data: data.update(counts=[1, 2, True]),
        lambda data: data.update(counts="abc"),
    ],
)
def test_what_is_no_fingerprint_is_refused(spoil):
    data = json.loads(THEN.to_json())
    spoil(data)
    with pytest.raises(ValueError, match=r"fingerprint|counts|digest"):
        Fingerprint.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"text"'])
def test_what_is_no_json_of_ours_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        Fingerprint.from_json(text)


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
)
def test_of_any_type_one_bit_and_the_type_itself_are_told(dtype):
    kind = getattr(torch, dtype)
    inputs = torch.arange(24).view(4, 3, 2).to(kind)
    targets = torch.arange(8.0).view(4, 2)
    own = Fingerprint.of(Examples(inputs, targets))
    assert own == Fingerprint.of(Examples(inputs.transpose(1, 2).contiguous().mT, targets))
    bits = inputs.clone().view(torch.uint8)
    bits[2, 1, 0] ^= 1
    assert Fingerprint.of(Examples(bits.view(kind), targets)).images != own.images
    # The same bytes as other numbers, where there is such a type.
    alike = {"int16": "float16", "float16": "bfloat16", "int32": "float32", "int64": "float64"}
    if other := alike.get(dtype):
        assert Fingerprint.of(Examples(inputs.view(getattr(torch, other)), targets)) != own


@pytest.mark.parametrize(
    "targets",
    [
        torch.arange(4.0),
        torch.arange(12.0).view(4, 3),
        torch.arange(24).view(4, 2, 3),
    ],
)
def test_targets_of_any_kind_and_origins_are_in_it(targets):
    inputs = torch.zeros(4, 5)
    own = Fingerprint.of(Examples(inputs, targets))
    moved = targets.clone()
    moved.view(-1)[-1] += 1
    other = Fingerprint.of(Examples(inputs, moved))
    assert other.images == own.images
    assert own.changes(other) == ["labels"]
    whose = [Origins(torch.tensor(ids), ("a", "b")) for ids in ([0, 0, 1, 1], [0, 1, 1, 1])]
    prints = [Fingerprint.of(Examples(inputs, targets, (), origins)) for origins in whose]
    assert len({own.labelled, *(one.labelled for one in prints)}) == 3
