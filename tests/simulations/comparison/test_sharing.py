"""Which cells share a GPU: by the memory that their like were seen to take, and not by hope."""

from __future__ import annotations

import pytest

from fedkn.gpus import GpuState
from simulations.comparison.sharing import GpuSharing, of_one_kind

GIB = 2**30
ITSELF = 700 * 2**20


def filled(sharing: GpuSharing, kind: str) -> list[int]:
    """Begin cells of `kind` until one has to wait; return the GPUs that they began on."""
    places = []
    while (place := sharing.place(kind)) is not None:
        sharing.begin(f"{kind}{len(places)}", kind, place)
        places.append(place)
    return places


def seen(sharing: GpuSharing, kind: str, bytes_: int, place: int = 0) -> None:
    """Let a cell of `kind` run to its end on an empty GPU and take so many bytes."""
    sharing.begin("first", kind, place)
    sharing.reserved("first", bytes_)
    sharing.settle("first")
    sharing.end("first")


def test_before_anything_is_known_every_gpu_gets_one_cell() -> None:
    assert filled(GpuSharing({0: 80 * GIB, 1: 80 * GIB}), "kernel") == [0, 1]


@pytest.mark.parametrize("taken", [GIB, 3 * GIB, 30 * GIB, 100 * GIB])
def test_as_many_run_as_fit_with_a_margin_and_one_always(taken: int) -> None:
    sharing = GpuSharing({0: 80 * GIB})
    seen(sharing, "kernel", taken)
    count = len(filled(sharing, "kernel"))
    each = taken * 1.1 + ITSELF
    assert count == max(1, int(80 * GIB // each))


def test_cells_are_spread_before_they_share() -> None:
    sharing = GpuSharing({0: 80 * GIB, 1: 80 * GIB})
    seen(sharing, "kernel", 30 * GIB)
    assert filled(sharing, "kernel") == [0, 1, 0, 1]


def test_beside_a_cell_that_has_not_shown_what_it_takes_nothing_begins() -> None:
    sharing = GpuSharing({0: 80 * GIB})
    seen(sharing, "kernel", GIB)
    # Nothing is known of this kind but that others took 1 GiB: twice that is expected.
    assert sharing.place("batch") == 0
    sharing.begin("b", "batch", 0)
    sharing.reserved("b", 5 * GIB)
    assert sharing.place("kernel") is None
    sharing.settle("b")
    assert sharing.place("kernel") == 0


def test_a_kind_never_seen_is_expected_to_take_twice_the_most() -> None:
    for free, fits in ((3 * GIB, False), (7 * GIB, True)):
        sharing = GpuSharing({0: free})
        seen(sharing, "kernel", GIB)
        sharing.begin("k", "kernel", 0)
        assert (sharing.place("group") is not None) is fits


def test_what_grows_later_counts() -> None:
    sharing = GpuSharing({0: 10 * GIB})
    seen(sharing, "kernel", GIB)
    sharing.begin("k", "kernel", 0)
    assert sharing.place("kernel") == 0
    sharing.reserved("k", 8 * GIB)
    assert sharing.place("kernel") is None
    assert sharing.end("k") == 0
    sharing.begin("again", "kernel", 0)
    assert sharing.place("kernel") is None, "its like may take as much"


def test_a_cell_that_needs_a_gpu_for_itself_waits_for_an_empty_one_and_keeps_it() -> None:
    sharing = GpuSharing({0: 80 * GIB})
    seen(sharing, "kernel", GIB)
    sharing.begin("k", "kernel", 0)
    assert sharing.place("kernel", alone=True) is None
    assert sharing.without(sharing.least_busy()).place("kernel") is None, "it is left to run empty"
    assert sharing.end("k") == 0
    assert sharing.place("kernel", alone=True) == 0
    sharing.begin("a", "kernel", 0, alone=True)
    assert sharing.place("kernel") is None


def test_the_end_tells_how_many_ran_beside_even_if_they_are_gone() -> None:
    sharing = GpuSharing({0: 80 * GIB})
    seen(sharing, "kernel", GIB)
    for name in "abc":
        sharing.begin(name, "kernel", 0)
    assert [sharing.end(name) for name in "abc"] == [2, 2, 2]
    sharing.begin("d", "kernel", 0)
    assert sharing.end("d") == 0
    assert sharing.end("nobody") == 0


def test_a_process_that_never_touched_the_gpu_teaches_nothing() -> None:
    sharing = GpuSharing({0: 80 * GIB})
    sharing.begin("k", "kernel", 0)
    sharing.settle("k")
    assert sharing.place("kernel") is None
    sharing.end("k")
    assert filled(sharing, "kernel") == [0]


def test_only_gpus_of_the_first_ones_kind_are_used_and_the_others_are_told() -> None:
    big, small = GpuState("H100", 70 * GIB, 80 * GIB), GpuState("T4", 15 * GIB, 16 * GIB)
    assert of_one_kind({0: big, 1: big}) == ({0: 70 * GIB, 1: 70 * GIB}, {})
    free, reasons = of_one_kind({0: "no driver", 1: big, 2: small})
    assert free == {1: 70 * GIB}
    assert reasons == {0: "no driver", 2: "it is another kind (T4) than the first (H100)"}
    assert of_one_kind({0: "no driver"}) == ({}, {0: "no driver"})
