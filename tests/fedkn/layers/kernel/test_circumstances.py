"""The layers under what PyTorch offers around them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from packaging.version import Version
from torch import nn

from fedkn.layers import KernelNorm2d, KNConv2d, dropout_stream
from tests.fedkn.layers.paths import path as implementation

OLD = Version(torch.__version__) < Version("2.7")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        KNConv2d(3, 8, 3, padding=1, activation="relu"),
        KNConv2d(8, 8, 3, padding=(1, 0, 1, 0), stride=2, groups=2),
        nn.ReLU(inplace=True),
        KNConv2d(8, 8, 1),
        KernelNorm2d(1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def inputs(batch: int = 5) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_vmap_over_clients_gives_each_client_its_own_gradients_and_masks() -> None:
    net = network()
    clients = {
        name: torch.stack([p.detach(), p.detach() * 1.1, p.detach() * 0.9])
        for name, p in net.named_parameters()
    }
    data = torch.stack([inputs(), inputs() + 1, inputs() * 2])
    seeds = torch.tensor([1, 2, 3])

    def loss(parameters, x, seed):
        with dropout_stream(seed):
            return torch.func.functional_call(net, parameters, x).square().sum()

    together = torch.func.vmap(torch.func.grad(loss))(clients, data, seeds)
    for i in range(3):
        own = {name: p[i].clone().requires_grad_() for name, p in clients.items()}
        alone = torch.autograd.grad(loss(own, data[i], int(seeds[i])), list(own.values()))
        for name, gradient in zip(own, alone, strict=True):
            error = (together[name][i] - gradient).abs().max() / gradient.abs().max()
            assert error.item() < 5e-5


def test_vmap_outside_a_stream_asks_for_randomness() -> None:
    layer, x = KNConv2d(3, 4, 3, dropout_p=0.3), inputs()[:, None].expand(2, 5, 1, 3, 8, 8)[:, 0]
    different = torch.func.vmap(layer, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    same = torch.func.vmap(layer, randomness="same")(x)
    torch.testing.assert_close(same[0], same[1])


def test_per_sample_gradients_by_functorch_match_a_loop() -> None:
    net = network().eval()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, x[None]).square().sum()

    x = inputs()
    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(len(x)):
        net.zero_grad()
        net(x[i : i + 1]).square().sum().backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(together[name][i], p.grad, rtol=1e-4, atol=1e-5)


def test_forward_mode_derivative() -> None:
    layer, x = KNConv2d(3, 4, 3, padding=1).eval().double(), inputs().double()
    _, forward = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    step = 1e-6
    torch.testing.assert_close(
        forward, (layer(x + step) - layer(x - step)) / (2 * step), rtol=1e-5, atol=1e-6
    )


# Torch 2.6 takes the largest int64 for its mark of a slice's end, so a batch is to be smaller.
BATCH = torch.export.Dim("batch", max=2**31 - 1)


def test_export_with_a_dynamic_batch() -> None:
    net = network().eval()
    program = torch.export.export(
        net, (inputs(),), dynamic_shapes=({0: BATCH},), strict=False
    )  # strict: False is the default from torch 2.7 on
    torch.testing.assert_close(program.module()(inputs(7)), net(inputs(7)), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(OLD, reason="torch 2.6 converts no in-place ReLU to ONNX")
def test_onnx_export_with_a_dynamic_batch(tmp_path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, path = network().eval(), tmp_path / "net.onnx"
    torch.onnx.export(
        net, (inputs(),), path, dynamo=True, verbose=False,
        dynamic_shapes=({0: BATCH},),
    )  # fmt: skip
    session = runtime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: inputs(7).numpy()})
    torch.testing.assert_close(torch.from_numpy(out), net(inputs(7)).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(OLD, reason="torch.compile of torch 2.6 takes no dropout stream")
def test_compile_has_one_graph_that_serves_every_batch_size_and_seed() -> None:
    torch._dynamo.reset()
    net = network()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for batch in (5, 6, 7, 9):
        for seed in range(2):
            with dropout_stream(seed):
                out = compiled(inputs(batch))
            with dropout_stream(seed):
                expected = net(inputs(batch))
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            out.sum().backward()
    assert counter.frame_count == 2  # the first size, then one graph for any size


def test_state_dict_has_parameters_alone_and_copies_are_whole() -> None:
    net = network()
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        with dropout_stream(1):
            first = net(inputs())
        with dropout_stream(1):
            assert torch.equal(twin(inputs()), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lowered", ["autocast", "module"])
def test_half_precision_keeps_float32_statistics(dtype, lowered) -> None:
    # |mean| is 30 deviations: statistics in half precision would be meaningless.
    torch.manual_seed(0)
    layer = KNConv2d(16, 8, 3, padding=1)
    x = (torch.randn(2, 16, 8, 8) + 30).to(dtype).float()
    layer.weight.data = layer.weight.data.to(dtype).float()
    with dropout_stream(1):
        expected = layer(x)
    wanted = torch.autograd.grad(expected.sum(), list(layer.parameters()))
    if lowered == "module":
        layer, x = layer.to(dtype), x.to(dtype)
    with dropout_stream(1), torch.autocast("cpu", dtype, enabled=lowered == "autocast"):
        y = layer(x)
    assert y.dtype == dtype
    step = torch.finfo(dtype).eps
    assert ((y.float() - expected).norm() / expected.norm()).item() < 8 * step
    got = torch.autograd.grad(y.float().sum(), list(layer.parameters()))
    for a, b in zip(got, wanted, strict=True):
        assert ((a.float() - b).norm() / b.norm()).item() < 16 * step


def test_channels_last_changes_nothing() -> None:
    net, x = network(), inputs()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        data = x.to(memory_format=layout).requires_grad_()
        with dropout_stream(1):
            out = net.to(memory_format=layout)(data)
        gradients = torch.autograd.grad(out.square().sum(), [data, *net.parameters()])
        results.append((out, *gradients))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_passes_forward_and_backward() -> None:
    net = network()
    out = net(inputs(0))
    assert out.shape == (0, 4)
    out.sum().backward()
    assert all(not p.grad.any() for p in net.parameters())


def test_an_in_place_operation_may_follow_the_layer() -> None:
    layer, x = KNConv2d(3, 4, 3), inputs()
    with dropout_stream(1):
        out = layer(x).add_(1.0).mul_(2.0)
    inplace = torch.autograd.grad(out.square().sum(), layer.weight)[0]
    with dropout_stream(1):
        out = (layer(x) + 1.0) * 2.0
    torch.testing.assert_close(inplace, torch.autograd.grad(out.square().sum(), layer.weight)[0])


def saved_bytes(net: nn.Module, x: torch.Tensor) -> int:
    storages: dict[int, int] = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(x)
    return sum(storages.values())


def test_memory_kept_for_the_backward_pass() -> None:
    def chain(block):
        return nn.Sequential(*[layer for _ in range(4) for layer in block()])

    x = torch.randn(2, 64, 16, 16, requires_grad=True)
    fused = saved_bytes(chain(lambda: [KNConv2d(64, 64, 3, padding=1, activation="relu")]), x)
    plain = saved_bytes(chain(lambda: [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]), x)
    batch = saved_bytes(
        chain(lambda: [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]), x
    )
    apart = saved_bytes(chain(lambda: [KNConv2d(64, 64, 3, padding=1), nn.ReLU()]), x)
    assert fused <= 1.1 * plain
    assert fused <= 0.85 * batch
    assert apart <= 1.05 * batch


@pytest.mark.parametrize("name", ["native", "plain"])
def test_a_kept_output_is_shared_with_the_pooling_that_follows(name) -> None:
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    kept = []
    for keeps_output in (False, True):
        layer = KNConv2d(8, 32, 3, padding=1, keeps_output=keeps_output)
        with implementation(name):
            kept.append(saved_bytes(nn.Sequential(layer, nn.MaxPool2d(2)), x))
            out = layer(x).add_(1.0)
        if keeps_output:
            with pytest.raises(RuntimeError, match="inplace"):
                out.sum().backward()
    assert kept[0] - kept[1] == 2 * 32 * 16 * 16 * 4
