"""That `explain` names the backend that runs, and says why the earlier ones do not."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from fedkn.errors import UserError
from fedkn.layers import KNConv1d, KNConv2d, dropout_stream, explain
from fedkn.layers.kernel import definition, dispatch
from fedkn.layers.kernel.backends import cpp, plain
from fedkn.layers.native import library
from tests.fedkn.layers.paths import path

X = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0))
NAMES = ["vmap", "cpp", "triton", "plain"]


def first_lines(text: str) -> tuple[str, list[str]]:
    served, *refused = text.splitlines()
    return served, [line.split(":")[0].removeprefix("  not ") for line in refused]


def test_the_fused_kernels_on_a_cpu() -> None:
    with path("native"):
        assert first_lines(explain(X, KNConv2d(8, 6, 3))) == ("cpp", ["vmap"])
        assert first_lines(explain(X[0], KNConv1d(9, 6, 3))) == ("cpp", ["vmap"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, layer: (x.double(), layer.double()), "float32"),
        (lambda x, layer: (x[:, :, :, ::2], layer), "neither contiguous nor channels last"),
        (lambda x, layer: (x.as_subclass(nn.Buffer), layer), "plain float32 tensors"),
    ],
)
def test_why_the_fused_kernels_do_not_serve(change, reason) -> None:
    with path("native"):
        x, layer = change(X, KNConv2d(8, 6, 3))
        text = explain(x, layer)
        assert first_lines(text) == ("plain", NAMES[:3])
        assert reason in text.splitlines()[2]


def test_switches_are_named() -> None:
    with library.switched_off():
        assert "switched off" in explain(X, KNConv2d(8, 6, 3))
    with path("plain"):
        assert "FEDKN_NATIVE=0" in explain(X, KNConv2d(8, 6, 3))


def test_small_units_in_evaluation_go_by_the_definition() -> None:
    layer = KNConv2d(8, 6, (1, 2)).eval()
    text = explain(X, layer)
    assert first_lines(text) == ("definition", NAMES)
    assert text.count("how many of their elements drop") == len(NAMES)
    assert first_lines(explain(X, layer.train()))[0] != "definition"


def test_autocast_decides_by_its_own_dtype() -> None:
    layer = KNConv2d(8, 6, 3)
    with path("native"), torch.autocast("cpu", torch.bfloat16):
        assert first_lines(explain(X, layer)) == ("plain", NAMES[:3])
        assert first_lines(explain(X.double(), layer.double()))[0] == "plain"


@pytest.mark.parametrize("own_weights", [True, False])
def test_under_vmap(own_weights) -> None:
    layer, said = KNConv2d(8, 6, 3), []

    def run(weight, x):
        said.append(explain(x, layer))
        with mock.patch.object(layer, "forward", lambda x: said.append(explain(x, layer)) or x):
            return functional_call(layer, {"weight": weight}, (x,))

    weights = layer.weight.detach().expand(3, -1, -1, -1, -1)
    with path("native"):
        vmap(run, (0 if own_weights else None, 0))(
            weights if own_weights else layer.weight.detach(), X.expand(3, -1, -1, -1, -1)
        )
    inside, looked_on = first_lines(said[1]), first_lines(said[0])
    assert looked_on == ("definition", NAMES)  # the layer's own weight is all clients'
    assert inside == (("vmap", []) if own_weights else ("definition", NAMES))
    assert "looks on" in said[0].splitlines()[2]


def test_what_is_explained_is_what_runs() -> None:
    layer, ran = KNConv2d(8, 6, 3), []

    def spy(row: dispatch.Row) -> dispatch.Row:
        return row._replace(run=lambda *given: ran.append(row.name) or row.run(*given))

    for name, given, made in (
        ("native", X, layer),
        ("native", X.double(), KNConv2d(8, 6, 3).double()),
        ("plain", X, layer),
        ("composite", X, layer),
        ("native", X, KNConv2d(8, 6, (1, 2)).eval()),
    ):
        ran.clear()
        with path(name), mock.patch.object(dispatch, "TABLE", tuple(map(spy, dispatch.TABLE))):
            made(given)
            assert (ran or ["definition"]) == [first_lines(explain(given, made))[0]]


def test_nothing_is_run_and_nothing_is_drawn() -> None:
    layer = KNConv2d(8, 6, 3)
    state = torch.get_rng_state()
    with (
        mock.patch.object(cpp, "of_clients", side_effect=AssertionError),
        mock.patch.object(plain, "forward", side_effect=AssertionError),
        mock.patch.object(definition, "convolution", side_effect=AssertionError),
    ):
        explain(X, layer)
    assert torch.equal(torch.get_rng_state(), state)
    with dropout_stream(1):
        explain(X, layer)
        first = layer(X)
    with dropout_stream(1):
        assert torch.equal(layer(X), first)


def test_what_is_no_kernel_normalized_convolution_is_refused() -> None:
    with pytest.raises(UserError, match="explain takes a KNConv1d or KNConv2d, not Conv2d"):
        explain(X, nn.Conv2d(8, 6, 3))
    with pytest.raises(UserError, match="add the batch dimension"):
        explain(X[0], KNConv2d(8, 6, 3))
