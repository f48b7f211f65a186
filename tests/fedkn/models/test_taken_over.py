"""What a converted network keeps of the original's layers: device, dtype, mode, freeze, hooks."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fedkn
from fedkn import models, normalizers
from fedkn.errors import UserError
from fedkn.layers import KNConv2d
from fedkn.training import Inputs, LocalTask, Workspace, train_locally

NAMES = normalizers.names()
KERNEL = normalizers.create("kernel")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(first=None, **options):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, **options),
        nn.BatchNorm2d(8) if first is None else first,
        nn.ReLU(),
        nn.Conv2d(8, 8, (2, 3), padding="same"),  # kernel's and sws' pad it in a layer of its own
        nn.GroupNorm(4, 8),
    )


def tensors(model):
    return (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point()))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_dtype_and_a_forward_in_it(name, dtype):
    model, _ = fedkn.convert(network().to(dtype), normalizers.create(name))
    assert {t.dtype for t in tensors(model)} == {dtype}
    out = model(X.to(dtype))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert model.eval()(X.to(dtype)).dtype == dtype


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", NAMES)
def test_the_meta_device(name):
    normalizer = normalizers.create(name)
    for model in (network().to("meta"), network(nn.LayerNorm([8, 6, 6])).to("meta")):
        converted, report = fedkn.convert(model, normalizer)
        assert {t.device.type for t in tensors(converted)} == {"meta"}
        assert converted(X.to("meta")).shape == (2, 8, 6, 6)
        assert converted.eval()(X.to("meta")).shape == (2, 8, 6, 6)
        assert report.changed
    with torch.device("meta"):  # nor does it matter where new tensors are made by default
        converted, _ = fedkn.convert(_on_cpu(), normalizer)
    assert {t.device.type for t in tensors(converted)} == {"cpu"}


def _on_cpu():
    with torch.device("cpu"):
        return network()


@pytest.mark.parametrize("name", ["kernel", "layer", "batch"])
def test_convnext_on_the_meta_device(name, torchvision):
    """Its LayerNorms have a forward of their own, which is tried with numbers."""
    with torch.device("meta"):
        source = torchvision.models.convnext_tiny(weights=None, num_classes=5)
    there, report = fedkn.convert(source, normalizers.create(name))
    here, _ = fedkn.convert(
        torchvision.models.convnext_tiny(weights=None, num_classes=5), normalizers.create(name)
    )
    assert [type(m) for m in there.modules()] == [type(m) for m in here.modules()]
    assert not [kept for kept in report.kept if "LayerNorm" in kept.layer]


@pytest.mark.parametrize("name", NAMES)
def test_networks_of_two_dtypes(name):
    class To(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, x):
            return x.to(self.dtype)

    double = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)).double()
    model, _ = fedkn.convert(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), To(torch.float64), double),
        normalizers.create(name),
    )
    assert model(X).dtype == torch.float64
    # Norms in float32 within a network of bfloat16, as mixed precision has them.
    half = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    half.bfloat16()[1].float()
    model, _ = fedkn.convert(half, normalizers.create(name))
    assert model(X.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(UserError, match="must share one dtype"):
        Workspace(nn.Sequential(nn.Conv2d(3, 8, 3), double))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_backbone_stays_frozen(name, affine):
    backbone = network(nn.BatchNorm2d(8, affine=affine), bias=False).requires_grad_(False)
    source = nn.Sequential(backbone, nn.Flatten(), nn.Linear(288, 3))
    model, _ = fedkn.convert(source, normalizers.create(name))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["2.weight", "2.bias"]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    images, labels = (255 * torch.rand(6, 3, 8, 8)).to(torch.uint8), torch.arange(6) % 3
    task = LocalTask(0, 1, 0, fedkn.config.TrainConfig(batch_size=3), 0.1)
    train_locally(
        Workspace(model),
        images,
        labels,
        task,
        inputs=Inputs("unit"),
        normalizer=normalizers.create(name),
    )
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"2.weight", "2.bias"}


@pytest.mark.parametrize("name", NAMES)
def test_frozen_layers_by_the_layer(name):
    source = network(bias=False)
    source[0].requires_grad_(False)
    source[1].requires_grad_(False)
    model, _ = fedkn.convert(source, normalizers.create(name))
    assert not any(p.requires_grad for part in model[:2] for p in part.parameters())
    learning = [p.requires_grad for part in model[3:] for p in part.parameters()]
    assert learning
    assert all(learning)
    bias_only = network()
    bias_only[1].weight.requires_grad_(False)
    model, _ = fedkn.convert(bias_only, normalizers.create("group"))
    assert (model[1].weight.requires_grad, model[1].bias.requires_grad) == (False, True)


@pytest.mark.parametrize("name", NAMES)
def test_the_mode_of_each_layer(name):
    source = network()
    source[1].eval()
    source[3].eval()
    model, _ = fedkn.convert(source, normalizers.create(name))
    for part, old in zip(model, source, strict=True):
        assert {m.training for m in part.modules()} == {old.training}


@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_hooks_go_over_to_the_new_layer_and_are_reported(name, place):
    source, seen = network(), []
    layer = source[place]
    layer.register_forward_hook(lambda _m, _args, out: seen.append("forward") or out * 2)
    layer.register_forward_pre_hook(lambda _m, _a, _k: seen.append("pre"), with_kwargs=True)
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    model, report = fedkn.convert(source, normalizers.create(name))
    assert seen == []
    changed = {change.name: change.note for change in report.changed}
    if type(model[place]) is not type(layer):
        # Fixup's one number in a norm's place has another shape than the norm's bias.
        assert changed[str(place)].removeprefix("bias of another shape left behind; ") == (
            "4 hooks moved to it"
        )
        assert f"changed {place}: {type(layer).__name__} -> " in str(report)
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    assert sorted(seen) == ["backward", "backward pre", "forward", "pre"]
    seen.clear()
    source(X)  # the original has its own
    assert sorted(seen) == ["forward", "pre"]


def test_what_a_hook_makes_of_an_output_is_what_the_next_layer_reads():
    source = network()
    source[0].register_forward_hook(lambda _m, _args, out: 0 * out + 1)
    model, _ = fedkn.convert(source, KERNEL)
    assert torch.equal(model[:1](X), torch.ones(2, 8, 6, 6))


def test_hooks_of_parameters_go_over_or_are_named():
    source, seen = network(), []
    for place in (0, 1):
        source[place].weight.register_hook(lambda g, place=place: seen.append(place) or g)
    group, report = fedkn.convert(source, normalizers.create("group"))
    group(X).square().sum().backward()
    assert sorted(seen) == [0, 1]
    kernel, report = fedkn.convert(source, KERNEL)
    notes = {change.name: change.note for change in report.changed}
    assert notes["1"] == "hooks of its weight are gone"
    seen.clear()
    kernel(X).square().sum().backward()
    assert seen == [0]


def test_fedkns_own_hook_stays_where_it_belongs():
    """GroupNorm of a 1x1 map is refused; the batch norm that takes its place is not."""
    source, _ = fedkn.convert(network(), normalizers.create("group"))
    model, report = fedkn.convert(source, normalizers.create("batch"))
    assert all("hook" not in change.note for change in report.changed)
    assert not model[1]._forward_pre_hooks
    there, _ = fedkn.convert(network(), normalizers.create("group"))
    assert len(there[1]._forward_pre_hooks) == 1


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def _parametrized(place, tensor):
    model = network()
    parametrize.register_parametrization(model[place], tensor, Doubled())
    return model


def _with_forward(place):
    model = network()
    plain = model[place].forward
    model[place].forward = lambda x: plain(x).tanh()
    return model


class ReadsItsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)) * self.norm.weight.sum()


class TiedPadding(nn.Module):
    """Its convolution's weight is read, and an uneven padding would put it into a Sequential."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 4, padding="same"), nn.BatchNorm2d(8)

    def forward(self, x):
        return nn.functional.conv_transpose2d(self.norm(self.conv(x)), self.conv.weight)


KEPT = {
    "parametrized weight": (lambda: _parametrized(0, "weight"), "0", "computed"),
    "parametrized bias": (lambda: _parametrized(0, "bias"), "0", "computed"),
    "parametrized scale": (lambda: _parametrized(1, "weight"), "1", "computed"),
    "forward of a norm": (lambda: _with_forward(1), "1", "given a forward of its own"),
    "forward of a convolution": (lambda: _with_forward(0), "0", "given a forward of its own"),
    "read norm": (ReadsItsNorm, "norm", "reads its tensors itself"),
    "read convolution": (TiedPadding, "conv", "reads its tensors"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("name", ["kernel", "ws_group", "sws"])
def test_what_another_layer_could_not_bear_is_kept_and_named(case, name):
    make, layer, words = KEPT[case]
    model, report = fedkn.convert(make(), normalizers.create(name))
    reasons = {kept.name: kept.reason for kept in report.kept}
    if name == "kernel" and case == "read convolution":
        assert isinstance(model.conv, KNConv2d)  # which pads by itself
    else:
        assert words in reasons[layer]
    assert model(X).shape[0] == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [(), (nn.ReLU(),), (nn.ReLU(), nn.MaxPool2d(2))])
def test_layer_norm_over_whole_maps(name, before):
    side = 3 if len(before) == 2 else 6
    source = nn.Sequential(
        nn.Conv2d(3, 8, 3), *before, nn.LayerNorm([8, side, side]), nn.Conv2d(8, 4, 1)
    )
    model, report = fedkn.convert(source, normalizers.create(name))
    assert not [kept for kept in report.kept if kept.layer == "LayerNorm"]
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert model(X).shape == (2, 4, side, side)
    if name == "group":
        (note,) = [c.note for c in report.changed if c.before == "LayerNorm"]
        assert note == "weight and bias of another shape left behind"


def test_layer_norms_that_are_kept_say_truly_why():
    def reason(*layers):
        _, report = fedkn.convert(nn.Sequential(*layers), KERNEL)
        (found,) = [kept.reason for kept in report.kept if kept.layer == "LayerNorm"]
        return found

    assert "every channel's map by itself" in reason(nn.Conv2d(3, 8, 3), nn.LayerNorm([6, 6]))
    assert "cannot be told" in reason(nn.LayerNorm([3, 8, 8]), nn.Flatten(), nn.Linear(192, 2))
    assert "does not normalize image maps" in reason(nn.Flatten(), nn.LayerNorm(192))


@pytest.mark.parametrize("name", NAMES)
def test_sync_batch_norm(name):
    """On one device it is batch norm; of the batch family it becomes just that."""
    source = nn.SyncBatchNorm.convert_sync_batchnorm(network(nn.BatchNorm2d(8, eps=1e-3)))
    source[1].running_var.fill_(3.0)
    model, _ = fedkn.convert(source, normalizers.create(name))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    assert model(X).shape == (2, 8, 6, 6)
    batch, _ = fedkn.convert(source, normalizers.create("batch"))
    assert type(batch[1]) is nn.BatchNorm2d
    torch.testing.assert_close(batch[:3].eval()(X), source[:3].eval()(X))


def test_tracked_instance_norm_gets_a_rule():
    instance = normalizers.create("instance")
    model, _ = fedkn.convert(network(nn.InstanceNorm2d(8, track_running_stats=True)), instance)
    assert instance.federation_rule(model)


@pytest.mark.parametrize(
    "layers",
    [
        (lambda: nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d),
        (lambda: nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d),
        (lambda: nn.Conv2d(3, 8, 3), lambda: nn.LazyInstanceNorm2d(affine=True)),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_lazy_layers_are_refused_until_they_have_shapes(layers, name):
    source = nn.Sequential(*(make() for make in layers))
    with pytest.raises(UserError, match="has no shape yet: send a batch through it first"):
        fedkn.convert(source, normalizers.create(name))
    source(X)
    model, _ = fedkn.convert(source, normalizers.create(name))
    assert model(X).shape == (2, 8, 6, 6)


def test_a_lazy_layer_that_is_not_converted_stays_lazy():
    model, _ = fedkn.convert(
        nn.Sequential(network(), nn.Flatten(), nn.LazyLinear(3)), normalizers.create("kernel")
    )
    assert model(X).shape == (2, 3)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
@pytest.mark.parametrize("normalizer", ["kernel", "sws"])
def test_torchvisions_networks_frozen_in_bfloat16(name, normalizer, torchvision):
    source = getattr(torchvision.models, name)(weights=None, num_classes=5)
    source.bfloat16().requires_grad_(False).eval()
    list(source.children())[-1].requires_grad_(True)
    model, _ = models.convert(source, normalizers.create(normalizer))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    learning = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 1
    assert not any(m.training for m in model.modules())
    out = model(torch.randn(1, 3, 64, 64).bfloat16())
    assert out.shape == (1, 5)
    assert out.dtype == torch.bfloat16
