from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedkn.data.examples import Origins
from fedkn.data.partition import SCHEMES, client_names, label_counts, partition
from fedkn.errors import UserError
from fedkn.seeds import numpy_generator

_TEN_CLASSES = np.repeat(np.arange(10), 100)


_REPAIRED = ("iid", "dirichlet", "shards", "quantity")


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, Any]:
    labels = np.array(draw(st.lists(st.integers(0, 5), min_size=1, max_size=120)))
    clients = draw(st.integers(1, len(labels)))
    return {
        "labels": labels,
        "scheme": draw(st.sampled_from(_REPAIRED)),
        "clients": clients,
        "seed": draw(st.integers(0, 10)),
        "alpha": draw(st.sampled_from([1e-6, 0.01, 0.3, 10.0, 1e6])),
        "sigma": draw(st.sampled_from([0.0, 1.0, 50.0, 1e300])),
        "shards_per_client": draw(st.integers(1, len(labels) // clients)),
        "minimum": draw(st.integers(1, len(labels) // clients)),
    }


def _assert_each_once(parts: list[np.ndarray], examples: int) -> None:
    assert sorted(np.concatenate(parts).tolist()) == list(range(examples))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@given(_cases())
@settings(deadline=None, max_examples=400)
def test_parts_are_disjoint_cover_all_and_are_large_enough(case: dict[str, Any]) -> None:
    parts = partition(**case)
    assert len(parts) == case["clients"]
    _assert_each_once(parts, len(case["labels"]))
    assert all(len(part) >= case["minimum"] for part in parts)


@given(
    classes=st.integers(1, 8),
    each=st.integers(1, 8),
    clients=st.integers(1, 12),
    seed=st.integers(0, 5),
    sizes=st.data(),
)
@settings(deadline=None, max_examples=300)
def test_every_client_has_exactly_so_many_labels(
    classes: int, each: int, clients: int, seed: int, sizes: st.DataObject
) -> None:
    assume(each <= classes <= clients * each)
    # Numbers with gaps, each of enough examples for all clients.
    names = np.arange(classes) * 3
    counts = [sizes.draw(st.integers(clients, 30)) for _ in names]
    labels = numpy_generator(seed, "test").permutation(np.repeat(names, counts))
    parts = partition(labels, "labels", clients=clients, seed=seed, labels_per_client=each)
    _assert_each_once(parts, len(labels))
    counted = label_counts(labels, parts, 3 * classes)[:, names]
    assert ((counted > 0).sum(1) == each).all()
    for own in counted.T:
        # Equally, among those who have it; and somebody has it.
        shares = own[own > 0]
        assert len(shares) > 0
        assert shares.max() - shares.min() <= 1
    if clients >= classes:
        # In turn, as Li et al. deal the first label.
        assert all(counted[client, client % classes] > 0 for client in range(clients))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels_per_client": 4}, r"in 1\.\.3, the labels"),
        ({"labels_per_client": 0}, r"in 1\.\.3"),
        ({"clients": 1}, "leave some of 3 labels to nobody: raise partition.labels_per_client"),
        (
            {"clients": 20, "labels_per_client": 3},
            "label 0 has 9 examples and was given to .* lower partition.clients",
        ),
        ({"minimum": 10}, "lower partition.clients or partition.minimum"),
        ({"minimum": 8}, "fewer than partition.minimum = 8 .*: set partition.minimum = 7"),
        ({"classed": False}, "these examples have none: use iid"),
    ],
)
def test_labels_that_cannot_be_dealt_are_refused(changes: dict[str, Any], message: str) -> None:
    labels = np.repeat(np.arange(3), 9)
    settings_: dict[str, Any] = {"clients": 3, "seed": 0, "labels_per_client": 2, **changes}
    with pytest.raises(UserError, match=message) as caught:
        partition(labels, "labels", **settings_)
    assert "\n" not in str(caught.value)


@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    times=st.integers(1, 3),
    seed=st.integers(0, 3),
)
@settings(deadline=None, max_examples=200)
def test_natural_clients_and_domains_are_the_datas_own(
    ids: list[int], times: int, seed: int
) -> None:
    origins = Origins(torch.tensor(ids), tuple("abcde"))
    labels, present = np.zeros(len(ids), np.int64), sorted(set(ids))
    natural = partition(labels, "natural", clients=len(present), seed=seed, origins=origins)
    _assert_each_once(natural, len(ids))
    assert [{ids[i] for i in part} for part in natural] == [{own} for own in present]
    assert client_names("natural", len(present), origins) == tuple("abcde"[o] for o in present)
    fewest = min(ids.count(own) for own in present)
    assume(fewest >= times)
    clients = times * len(present)
    parts = partition(labels, "domains", clients=clients, seed=seed, origins=origins)
    _assert_each_once(parts, len(ids))
    names = client_names("domains", clients, origins)
    for client, part in enumerate(parts):
        assert {"abcde"[ids[i]] for i in part} == {names[client]}
    for name in set(names):
        sizes = [len(part) for part, own in zip(parts, names, strict=True) if own == name]
        assert len(sizes) == times
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("scheme", "changes", "message"),
    [
        ("natural", {"clients": 2}, "of 3 clients, and partition.clients is 2: set .* = 3"),
        ("natural", {"clients": 5}, "of 3 clients, and partition.clients is 5: set .* = 3"),
        ("natural", {"clients": 3, "minimum": 2}, "1 of 3 clients have fewer .*client 2: 1"),
        ("natural", {"origins": None}, "whose each example is.*client_folders"),
        ("domains", {"clients": 4}, "of 3 domains, and 4 clients .*= 3 or 6"),
        ("domains", {"clients": 2}, "of 3 domains, and 2 clients .*= 3"),
        ("domains", {"clients": 6}, "fewer than partition.minimum = 1 .*use more examples"),
        ("domains", {"origins": None}, "of which domain: source digits_domains"),
    ],
)
def test_origins_that_do_not_fit_are_refused(
    scheme: str, changes: dict[str, Any], message: str
) -> None:
    origins = Origins(torch.tensor([0, 0, 0, 0, 1, 1, 1, 2]), ("ann", "bob", "cy"))
    settings_: dict[str, Any] = {"clients": 3, "seed": 0, "origins": origins, **changes}
    with pytest.raises(UserError, match=message) as caught:
        partition(np.zeros(8, np.int64), scheme, **settings_)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", [one for one in SCHEMES if one != "natural"])
def test_pure_function_of_the_seed(scheme: str) -> None:
    origins = Origins(torch.arange(1000) % 7, tuple("abcdefg"))

    def draw(seed: int) -> list[list[int]]:
        labels = torch.from_numpy(_TEN_CLASSES)
        parts = partition(labels, scheme, clients=14, seed=seed, origins=origins)
        return [part.tolist() for part in parts]

    first = draw(3)
    # The global state must neither matter nor move.
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    assert draw(3) == first
    after = np.random.random()  # noqa: NPY002
    np.random.seed(99)  # noqa: NPY002
    assert np.random.random() == after  # noqa: NPY002
    assert draw(4) != first


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(part) for part in partition(_TEN_CLASSES, "iid", clients=7, seed=0)]
    assert max(sizes) - min(sizes) <= 1


def test_shards_give_each_client_few_labels_and_equal_sizes() -> None:
    parts = partition(_TEN_CLASSES, "shards", clients=50, seed=0, shards_per_client=2)
    counts = label_counts(_TEN_CLASSES, parts, 10)
    assert (counts.sum(1) == 20).all()
    # 100 shards of 10 examples: none straddles two of the labels, which have 100 each.
    assert set(counts.flatten().tolist()) <= {0, 10, 20}


def test_dirichlet_skew_shrinks_with_alpha() -> None:
    def skew(alpha: float) -> float:
        parts = partition(_TEN_CLASSES, "dirichlet", clients=10, seed=1, alpha=alpha)
        return float(label_counts(_TEN_CLASSES, parts, 10).std(axis=0).mean())

    # The deviation of a Dirichlet share is sqrt((1/K)(1 - 1/K)/(K alpha + 1)), K = 10 clients.
    assert skew(1e6) < 1
    for alpha in (0.1, 1.0):
        expected = 100 * np.sqrt(0.09 / (10 * alpha + 1))
        assert skew(alpha) == pytest.approx(expected, rel=0.35)
    assert skew(0.1) > skew(1.0) > skew(100.0)


def test_quantity_sizes_are_log_normal_and_labels_even() -> None:
    labels = np.tile(np.arange(4), 50_000)
    parts = partition(labels, "quantity", clients=400, seed=0, sigma=0.8)
    assert np.log([len(part) for part in parts]).std() == pytest.approx(0.8, rel=0.15)
    largest = label_counts(labels, parts, 4)[np.argmax([len(part) for part in parts])]
    assert (largest / largest.sum()) == pytest.approx(np.full(4, 0.25), abs=0.04)


def test_quantity_without_spread_is_even() -> None:
    sizes = [len(p) for p in partition(_TEN_CLASSES, "quantity", clients=7, seed=0, sigma=0)]
    assert max(sizes) - min(sizes) <= 1


def test_repair_moves_no_more_than_is_short() -> None:
    parts = partition(_TEN_CLASSES, "quantity", clients=100, seed=0, sigma=3.0, minimum=1)
    repaired = partition(_TEN_CLASSES, "quantity", clients=100, seed=0, sigma=3.0, minimum=5)
    before, after = (np.array([len(part) for part in own]) for own in (parts, repaired))
    assert before.min() < 5
    # Who had enough and is not among the largest keeps what it had.
    short, donors = before < 5, after < before
    assert (after[short] == 5).all()
    assert (before - after)[donors].sum() == (5 - before[short]).sum()
    assert before[donors].min() >= after[~short].max()
    assert all(
        np.array_equal(old, new)
        for old, new, same in zip(parts, repaired, before == after, strict=True)
        if same
    )


def test_label_counts_against_a_loop() -> None:
    labels = np.array([0, 2, 2, 1, 0])
    parts = [np.array([0, 1, 2]), np.array([3]), np.array([], dtype=np.int64), np.array([4])]
    expected = [[1, 0, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert label_counts(torch.from_numpy(labels), parts, 4).tolist() == expected
    assert label_counts(labels, [], 4).shape == (0, 4)


@pytest.mark.parametrize(
    ("scheme", "changes", "names"),
    [
        ("iid", {"clients": 0}, ["partition.clients"]),
        ("iid", {"minimum": 0}, ["partition.minimum"]),
        ("iid", {"clients": 11}, ["partition.clients", "partition.minimum"]),
        ("dirichlet", {"minimum": 6}, ["partition.clients", "partition.minimum"]),
        ("dirichlet", {"alpha": 0.0}, ["partition.alpha"]),
        ("dirichlet", {"alpha": float("nan")}, ["partition.alpha"]),
        ("shards", {"shards_per_client": 6}, ["partition.shards_per_client", "partition.clients"]),
        ("shards", {"shards_per_client": 0}, ["partition.shards_per_client"]),
        ("quantity", {"sigma": -1.0}, ["partition.sigma"]),
        ("quantity", {"sigma": float("inf")}, ["partition.sigma"]),
        ("dirichelt", {}, ["did you mean 'dirichlet'"]),
    ],
)
def test_impossible_settings_are_named(
    scheme: str, changes: dict[str, float], names: list[str]
) -> None:
    settings_: dict[str, Any] = {"clients": 2, "seed": 0, **changes}
    with pytest.raises(UserError) as caught:
        partition(np.zeros(10, dtype=np.int64), scheme, **settings_)
    assert all(name in str(caught.value) for name in names)
    assert "\n" not in str(caught.value)
