"""The GPU that is not there refuses what a GPU refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fedkn.training.captured import Captured
from tests.pretended_gpu import Gpu, pretended_gpu


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretended_gpu() as gpu:
        yield gpu


@pytest.mark.usefixtures("gpu")
def test_tensors_know_where_they_are() -> None:
    x = torch.zeros(2, 3, device="cuda")
    assert (x.device, x.is_cuda) == (torch.device("cuda", 0), True)
    made = (x + 1, x[0], torch.zeros_like(x), x.new_ones(4), x.to(torch.float64), x.T.contiguous())
    assert all(one.is_cuda for one in made)
    assert not any(one.is_cuda for one in (x.cpu(), torch.zeros(2), x.new_ones(2, device="cpu")))
    doubled = torch.func.vmap(lambda row: row.to("cuda") * 2)(x)
    assert doubled.is_cuda
    layer = torch.nn.Linear(3, 2).to("cuda")
    layer(x).sum().backward()
    assert all(p.is_cuda and p.grad is not None and p.grad.is_cuda for p in layer.parameters())


@pytest.mark.usefixtures("gpu")
def test_tensors_in_two_places_do_not_go_together() -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert (there + torch.tensor(2.0)).is_cuda
    for mix in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: there.index_select(0, torch.tensor([0])),
        lambda: here.add_(there.sum()),
        lambda: here[torch.tensor([0], device="cuda")],
    ):
        with pytest.raises(RuntimeError):
            mix()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_nothing_waits_while_a_graph_is_captured(gpu: Gpu) -> None:
    x = torch.ones(3, device="cuda")
    for what in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x.add_(torch.ones(3).to("cuda")),
        lambda: torch.tensor([1.0], device="cuda"),
        x.cpu,
    ):
        with pytest.raises(RuntimeError, match="capturing"):
            Captured(lambda what=what: [what()].clear(), (x,))
    assert gpu.capturing is None


@pytest.mark.usefixtures("gpu")
def test_a_graph_does_the_same_again_and_sees_nothing_of_python() -> None:
    total, step = torch.zeros(1, device="cuda"), [1.0]
    graph = Captured(lambda: total.add_(torch.ones_like(total) * step[0]), (total,))
    assert float(total) == 0.0
    step[0] = 100.0
    graph.replay()
    graph.replay()
    assert float(total) == 2.0


def test_streams_that_do_not_wait_are_a_race(gpu: Gpu) -> None:
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    x = torch.zeros(3, device="cuda")
    one.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(one):
        x.add_(1)
    other.wait_stream(one)
    with torch.cuda.stream(other):
        x.mul_(2)
    assert gpu.order.races == {}
    x.sum()
    assert len(gpu.order.races) == 1


def test_graphs_that_run_at_once_share_no_memory_of_cublas(gpu: Gpu) -> None:
    """Captured on one stream, replayed on two."""
    graphs, streams = [], [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in streams:
        x = torch.ones(3, 3, device="cuda")
        graphs.append(Captured(lambda x=x: x.copy_(x @ x), (x,)))
    for stream, graph in zip(streams, graphs, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.replay()
    assert gpu.order.races == {}
