"""A source of one's own: what it may return, and what is said of what it may not."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from fedkn.data.examples import Examples, Source
from fedkn.data.own import load_own_source
from fedkn.data.sources import load
from fedkn.errors import UserError

_RNG = np.random.default_rng(0)
_X = _RNG.standard_normal((40, 2, 7))
_Y = np.arange(40) % 4
_CLIENTS = np.array(["ann", "bob", "cy", "dee"])[np.arange(40) // 10]


class _Items(Dataset[Any]):
    classes = ("a", "b", "c", "d")

    def __init__(self, *columns: Any) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, index: int) -> Any:
        return tuple(column[index] for column in self._columns)


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(_X, _Y, strict=True)


def _whole(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets of both parts, in the order of the inputs."""
    both = source.train.joined(source.test)
    order = np.argsort(both.inputs.reshape(len(both), -1)[:, 0].numpy())
    return both.inputs.numpy()[order], both.targets.numpy()[order]


@pytest.mark.parametrize(
    "returned",
    [
        (_X, _Y),
        [_X, _Y],
        (torch.from_numpy(_X), torch.from_numpy(_Y)),
        (_X.tolist(), _Y.tolist()),
        {"inputs": _X, "targets": _Y},
        {"train": (_X, _Y)},
        {"train": {"inputs": _X, "targets": _Y}, "test": None},
        _Items(_X, _Y),
        _Items(torch.from_numpy(_X), _Y.tolist()),
        _Stream(),
        (_Items(_X[:30], _Y[:30]), _Items(_X[30:], _Y[30:])),
        ((_X[:30], _Y[:30]), (_X[30:], _Y[30:])),
        {
            "inputs": _X[:30],
            "targets": _Y[:30],
            "test_inputs": _X[30:],
            "test_targets": _Y[30:],
        },
        Examples(torch.from_numpy(_X), torch.from_numpy(_Y), ("0", "1", "2", "3")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_all_that_may_be_returned_gives_the_same_examples(returned: Any) -> None:
    source = load_own_source("mine:data", lambda: returned, None, {})
    inputs, targets = _whole(source)
    order = np.argsort(_X[:, 0, 0])
    assert inputs.dtype == np.float64
    assert np.array_equal(inputs, _X[order])
    assert np.array_equal(targets, _Y[order])
    assert len(source.test) == (10 if not source.held_out else 8)
    assert source.num_classes == 4


def test_a_source_is_returned_as_it_is() -> None:
    data = Examples(torch.from_numpy(_X), torch.from_numpy(_X[:, 0, 0]).float())
    own = Source("theirs", data, data)
    source = load_own_source("mine:data", lambda: own, None, {})
    assert (source.name, source.train, source.test) == ("mine:data", data, data)


@pytest.mark.parametrize("part", [(_X, _Y, _CLIENTS), _Items(_X, _Y, _CLIENTS.tolist())])
def test_clients_are_held_out_for_tests_each(part: Any) -> None:
    source = load_own_source("mine:data", lambda: part, None, {})
    for data, each in ((source.train, 8), (source.test, 2)):
        assert data.origins is not None
        assert data.origins.names == ("ann", "bob", "cy", "dee")
        assert torch.bincount(data.origins.ids).tolist() == [each] * 4
        for x, client in zip(data.inputs.numpy(), data.origins.ids, strict=True):
            (row,) = np.flatnonzero((x == _X).all((1, 2)))
            assert data.origins.names[client] == _CLIENTS[row]


def test_integers_that_name_clients_are_in_the_order_of_numbers() -> None:
    ids = np.array([10, 9, 100, 9] * 10)
    source = load_own_source("mine:data", lambda: (_X, _Y, ids), None, {})
    assert source.train.origins is not None
    assert source.train.origins.names == ("9", "10", "100")


@pytest.mark.parametrize(
    ("targets", "dtype", "shape", "classes"),
    [
        (_RNG.standard_normal(40), torch.float32, (), 0),
        (_RNG.standard_normal((40, 3)), torch.float32, (3,), 0),
        (_RNG.integers(0, 2, (40, 5)), torch.float32, (5,), 0),
        (_RNG.integers(0, 2, (40, 5)) > 0, torch.float32, (5,), 0),
        (np.arange(40 * 6).reshape(40, 2, 3) % 4, torch.int64, (2, 3), 4),
        ((np.arange(40 * 6).reshape(40, 2, 3) % 4).astype(np.uint8), torch.int64, (2, 3), 4),
        (np.arange(40) % 2 > 0, torch.int64, (), 2),
    ],
)
def test_targets_of_any_kind(
    targets: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...], classes: int
) -> None:
    data = load_own_source("mine:data", lambda: (_X, targets), None, {}).train
    assert (data.targets.dtype, tuple(data.targets.shape[1:])) == (dtype, shape)
    assert data.num_classes == classes


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
)
def test_inputs_keep_type_and_every_bit(dtype: str) -> None:
    inputs = (_X * 30).astype(dtype)
    source = load_own_source("mine:data", lambda: (inputs, _Y), None, {})
    found, _ = _whole(source)
    assert found.dtype == dtype
    assert sorted(map(bytes, found)) == sorted(map(bytes, inputs))


@pytest.mark.parametrize(
    "inputs",
    [
        np.arange(80, dtype=np.uint16).reshape(40, 2) * 800,
        np.arange(80, dtype=np.uint32).reshape(40, 2) * 50_000_000,
        np.arange(80, dtype=">f4").reshape(40, 2),
        np.arange(160, dtype=np.float32).reshape(40, 4)[:, ::-2],
        torch.arange(80).view(40, 2).to(torch.uint16),
        torch.arange(80).view(40, 2).bfloat16(),
    ],
    ids=["uint16", "uint32", "big-endian", "strides", "tensor uint16", "bfloat16"],
)
def test_types_that_torch_cannot_hold_keep_their_values(inputs: Any) -> None:
    source = load_own_source("mine:data", lambda: (inputs, _Y), None, {})
    found = source.train.joined(source.test).inputs.double()
    expected = torch.from_numpy(
        inputs.double().numpy() if isinstance(inputs, torch.Tensor) else inputs.astype(np.float64)
    )
    assert sorted(found.tolist()) == sorted(expected.tolist())


def test_options_and_root_are_keyword_arguments(tmp_path: Path) -> None:
    def made(root: Path | None = None, *, count: int, scale: float = 1.0) -> Any:
        assert root == tmp_path
        return _X[:count] * scale, _Y[:count]

    source = load_own_source("mine:data", made, tmp_path, {"count": 20})
    assert len(source.train) + len(source.test) == 20


@pytest.mark.parametrize(
    ("root", "options", "message"),
    [
        (None, {"count": 1}, r"needs data\.root"),
        (Path("x"), {}, r"missing a required .*'count'.*it takes \(root: "),
        (Path("x"), {"count": 1, "depth": 2}, "unexpected keyword argument 'depth'"),
    ],
)
def test_arguments_that_do_not_fit(root: Any, options: dict[str, Any], message: str) -> None:
    def made(root: Path, count: int) -> Any:
        raise AssertionError

    with pytest.raises(UserError, match=message):
        load_own_source("mine:data", made, root, options)
    with pytest.raises(UserError, match="takes no root"):
        load_own_source("mine:data", lambda: None, Path("x"), {})


def test_draws_are_the_same_at_every_call_and_leave_no_trace() -> None:
    def drawn() -> Any:
        inputs = torch.rand(30, 2) + float(np.random.random()) + random.random()  # noqa: NPY002
        return inputs, np.arange(30) % 2

    random.seed(5)
    first = load_own_source("mine:data", drawn, None, {})
    states = torch.get_rng_state(), random.random()
    torch.rand(3)
    np.random.random()  # noqa: NPY002
    again = load_own_source("mine:data", drawn, None, {})
    assert again.train.inputs.equal(first.train.inputs)
    random.seed(5)
    assert random.random() == states[1]
    other = load_own_source("mine:other", drawn, None, {})
    assert not other.train.inputs.equal(first.train.inputs)


def _fails() -> Any:
    raise KeyError("no\nsuch file")


def _item(function: Callable[[int], Any]) -> Any:
    class Items(Dataset[Any]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Any:
            return function(index)

    return Items()


_NAN = _X.copy()
_NAN[3, 1, 2] = np.nan


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"returned nothing: return \(inputs, targets\)"),
        (_X, "returned a ndarray"),
        ((_X, _Y, _CLIENTS, 1), r"a tuple of 4 \(ndarray, ndarray, ndarray, int\)"),
        ({"x": _X}, r"mapping with \['x'\]: give train, test and classes, or inputs"),
        ({"inputs": _X}, "mapping without 'targets'"),
        ({"inputs": _X, "targets": _Y, "test_inputs": _X}, "without 'test_targets'"),
        ({"train": (_X, _Y), "inputs": _X}, "both 'train' and 'inputs'"),
        ((_X, _Y[:-1]), "40 inputs but 39 targets"),
        ((_X, _Y, _CLIENTS[:-1]), "40 examples but 39 client ids"),
        ((_X, _Y, _Y / 2), r"'clients' must be \(N,\) integers or names, got float64"),
        ((_X.astype(object), _Y), "'inputs' holds Python objects"),
        ((_X.astype(str), _Y), "'inputs' must hold numbers"),
        ((_X > 0, _Y), "'inputs' must hold integers or floating point, got bool"),
        ((_X + 1j, _Y), "got complex128"),
        (([[1.0], [1.0, 2.0]], [0, 1]), "'inputs' is no array: its examples differ in shape"),
        ((_X[:0], _Y[:0]), "has no training examples|one class"),
        ((_X[:, 0, 0], _Y), r"give each example an axis, as x\[:, None\]"),
        ((_X[:, :0], _Y), r"must be \(N, F\)"),
        ((_NAN, _Y), r"'inputs' holds nan at index \(3, 1, 2\)"),
        ((_X, np.where(_Y == 1, np.inf, 1.0)), "'targets' holds inf at index 1"),
        ((_X, np.full(40, 1e300)), "1e[+]300 at index 0, which float32 cannot"),
        ((_X, _Y * 0), "one class only"),
        ((_X, _Y + 5), "the labels run from 5 to 8, and none is 0"),
        ((_X, _Y * 1000), "4 different numbers up to 3000"),
        ((_X, _Y - 1), "'targets' holds -1"),
        ((_X, np.array(["a", "b"] * 20)), "names of the classes as 'classes'"),
        (((_X, _Y), (_X[:, :1], _Y)), "training inputs are float64 2x7 but test inputs"),
        (((_X, _Y), (_X.astype("f4"), _Y)), "float64 2x7 but test inputs are float32 2x7"),
        ({"inputs": _X, "targets": _Y, "classes": ["a", "b"]}, "'classes' has 2 names, found 3"),
        (_item(lambda i: np.zeros(3)), r"item 0 is ndarray, not \(input, target\)"),
        (_item(lambda i: (np.zeros(3 + i // 3), 0)), r"item 3: its input is float64 \(4,\)"),
        (_item(lambda i: (np.zeros(3), "cat")), "item 0: its target is str .*no number"),
        (_item(lambda i: (np.zeros(3), 0, "x")[: 2 + (i < 2)]), "item 2 has 2 parts, those"),
        (_item(lambda i: [][i]), "item 0 cannot be read: IndexError"),
        (_Items(_X[:0], _Y[:0]), "no examples: its data set is empty"),
        ((torch.from_numpy(_X).to_sparse(), _Y), r"'inputs' is a sparse tensor: .*x\.to_dense\(\)"),
        ({"train": range(3)}, "train: item 0 is int, not"),
        ({"train": 3}, "gives as train a int"),
        ((_Items(_X, _Y), range(3)), r"tuple of 2 \(_Items, range\), is taken for \(train, test\)"),
        (((_X, _Y), (_X[:, :1], _Y)), r"tuple of 2 \(tuple, tuple\), is taken for \(train, test\)"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(returned: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_own_source("mine:data", lambda: returned, None, {})
    assert str(caught.value).isprintable()
    assert "source 'mine:data'" in str(caught.value)


def test_tables_are_taken_as_the_numbers_in_them() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(_X[:, 0], columns=list("abcdefg"))
    owners = pandas.Series(_CLIENTS)
    for returned in (
        (frame, pandas.Series(_Y), owners),
        {"inputs": frame, "targets": pandas.Series(_Y), "clients": owners},
    ):
        source = load_own_source("mine:data", lambda returned=returned: returned, None, {})
        inputs, targets = _whole(source)
        order = np.argsort(_X[:, 0, 0])
        assert np.array_equal(inputs, _X[order, 0])
        assert np.array_equal(targets, _Y[order])
        assert source.train.origins is not None
        assert source.train.origins.names == ("ann", "bob", "cy", "dee")
    mixed = frame.assign(word="x", yes=True)
    with pytest.raises(UserError, match=r"'inputs' is a DataFrame .* 'word' \(.*'yes' \(bool\)"):
        load_own_source("mine:data", lambda: (mixed, _Y), None, {})
    with pytest.raises(UserError, match=r"returned a DataFrame: return \(inputs, targets\)"):
        load_own_source("mine:data", lambda: frame, None, {})


@pytest.mark.parametrize("kind", ["csr_matrix", "csr_array", "coo_array"])
def test_sparse_arrays_are_told_how_to_be_dense(kind: str) -> None:
    sparse = getattr(pytest.importorskip("scipy.sparse"), kind)(_X[:, 0])
    for returned in ((sparse, _Y), {"train": {"inputs": sparse, "targets": _Y}}):
        with pytest.raises(UserError, match=rf"is a sparse {kind}: give x\.toarray\(\)"):
            load_own_source("mine:data", lambda returned=returned: returned, None, {})


def test_a_function_that_fails_is_named_with_its_line() -> None:
    with pytest.raises(UserError, match=r"failed: KeyError: .*such file.*test_own\.py, line \d+"):
        load_own_source("mine:data", _fails, None, {})
    with pytest.raises(UserError, match="is no function"):
        load_own_source("mine:data", 3, None, {})


def test_a_pillow_image_is_told_its_transform() -> None:
    image = pytest.importorskip("PIL.Image")
    pictures = _item(lambda i: (image.new("L", (3, 3)), 0))
    with pytest.raises(UserError, match="PILToTensor"):
        load_own_source("mine:data", lambda: pictures, None, {})


def test_more_than_fits_into_memory_is_refused_after_the_first_item(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = psutil.virtual_memory()._replace(available=1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    read = []

    class Large(Dataset[Any]):
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return np.zeros(1000), 0

    with pytest.raises(UserError, match=r"1,000 examples of 8,008 bytes need .* GB of memory"):
        load_own_source("mine:data", Large, None, {})
    assert read == [0]


def test_by_reference_with_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mydata.py").write_text(
        "import numpy as np\n"
        "def made(count):\n"
        "    return np.zeros((count, 3), 'f4'), np.arange(count) % 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = load("mydata:made", options={"count": 50}, train_limit=12, test_limit=4)
    assert (len(source.train), len(source.test)) == (12, 4)
    assert torch.bincount(source.train.targets).tolist() == [6, 6]
    with pytest.raises(UserError, match=r"it has .*made"):
        load("mydata:other")
    with pytest.raises(UserError, match="takes no options"):
        load("digits", options={"count": 50})
