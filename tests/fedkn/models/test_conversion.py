from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedkn
from fedkn import models, normalizers
from fedkn.errors import UserError
from fedkn.layers import KernelNorm2d, KNConv2d, LayerNorm2d, WSConv2d
from fedkn.normalizers import TensorRole

KERNEL = normalizers.create("kernel", dropout_p=0.1)
GROUP = normalizers.create("group", groups=2)
X = torch.linspace(-3, 3, 2 * 4 * 9 * 9).sin().view(2, 4, 9, 9)


def conv_bn(*more, **options):
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, bias=False, **options), nn.BatchNorm2d(6), nn.ReLU(), *more
    )


def copy_in_order(target, source, kinds):
    pairs = [[m for m in model.modules() if isinstance(m, kinds)] for model in (target, source)]
    for mine, other in zip(*pairs, strict=True):
        mine.weight.data.copy_(other.weight)
        if mine.bias is not None and other.bias is not None:
            mine.bias.data.copy_(other.bias)


def test_export():
    assert fedkn.convert is models.convert


def test_torchvision_resnet_to_group_equals_torchvision_built_with_group(torchvision):
    resnet18 = torchvision.models.resnet18
    source = resnet18(weights=None, num_classes=5)
    for norm in (m for m in source.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
    reference = resnet18(weights=None, num_classes=5, norm_layer=partial(nn.GroupNorm, 4))
    reference.load_state_dict(source.state_dict(), strict=False)
    model, report = models.convert(source, normalizers.create("group", groups=4))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), reference(x))
    assert report.traced
    assert len(report.changed) == 20
    assert not report.kept


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_torchvision_to_kernel_equals_our_network_built_with_kernel(name, torchvision):
    source = getattr(torchvision.models, name)(weights=None, num_classes=5)
    ours = models.build(
        name,
        num_classes=5,
        in_channels=3,
        normalizer=KERNEL,
        low_resolution=False,
    )
    copy_in_order(ours, source, (nn.Conv2d, KNConv2d, nn.Linear))
    model, report = models.convert(source, KERNEL)
    # Our head scales the last dropout as published, convert knows one dropout.
    for norm in (m for m in ours.modules() if isinstance(m, KernelNorm2d)):
        norm.dropout_p = KERNEL.dropout_p
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), ours.eval()(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, nn.Conv2d | nn.BatchNorm2d) for m in model.modules())
    assert not report.kept
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_convnext_gets_other_norms_in_both_layouts(torchvision):
    source = torchvision.models.convnext_tiny(weights=None, num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    same, _ = models.convert(source, normalizers.create("layer"))
    kinds = {type(m) for m in same.modules()}
    assert LayerNorm2d in kinds
    assert nn.LayerNorm not in kinds
    assert same(x).shape == (2, 5)
    kernel, report = models.convert(source, KERNEL)
    assert sum(isinstance(m, KNConv2d) for m in kernel.modules()) == 22
    assert not report.kept
    kernel(x).sum().backward()


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_nets_whose_norms_have_no_telling_name(name, torchvision):
    source = getattr(torchvision.models, name)(weights=None, num_classes=5)
    model, _ = models.convert(source, KERNEL)
    rule = KERNEL.federation_rule(model)
    assert set(rule.values()) == {TensorRole.SHARED}
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_the_original_is_left_alone_and_weights_are_kept():
    source = conv_bn()
    before = repr(source)
    model, _ = models.convert(source, KERNEL)
    assert repr(source) == before
    assert [type(m) for m in model] == [KNConv2d, nn.Identity, nn.ReLU]
    assert torch.equal(model[0].weight, source[0].weight)
    assert model[0].bias.tolist() == [0.0] * 6
    model[0].weight.data.zero_()
    assert source[0].weight.abs().sum() > 0


@pytest.mark.parametrize("name", normalizers.names())
def test_global_random_state_is_left_alone(name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    source = conv_bn()
    torch.manual_seed(5)
    models.convert(source, normalizers.create(name))
    models.fold_batch_norm(source)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", normalizers.names())
def test_every_normalizer_and_its_rule(name):
    normalizer = normalizers.create(name)
    model, report = models.convert(conv_bn(nn.Conv2d(6, 4, 1), nn.GroupNorm(2, 4)), normalizer)
    assert model(X).shape == (2, 4, 7, 7)
    assert list(normalizer.federation_rule(model)) == list(model.state_dict())
    assert str(report).splitlines()[0].endswith("read from the data flow")
    gained = [m.bias is not None for m in model.modules() if hasattr(m, "kernel_size")]
    assert gained[0] == (not normalizer.affine)


def test_scales_and_biases_move_to_the_new_norm():
    source = conv_bn()
    nn.init.uniform_(source[1].weight)
    nn.init.uniform_(source[1].bias)
    model, _ = models.convert(source, GROUP)
    by_hand = F.group_norm(source[0](X), 2, source[1].weight, source[1].bias).relu()
    torch.testing.assert_close(model(X), by_hand)


def test_batch_norm_to_batch_keeps_its_statistics():
    source = conv_bn()
    source(X)
    model, report = models.convert(source, normalizers.create("batch"))
    assert torch.equal(model[1].running_mean, source[1].running_mean)
    assert not report.changed
    assert "already" in report.kept[0].reason


def test_weight_standardized_and_back():
    there, _ = models.convert(conv_bn(), normalizers.create("ws_group", groups=2))
    assert isinstance(there[0], WSConv2d)
    back, _ = models.convert(there, normalizers.create("batch"))
    assert type(back[0]) is nn.Conv2d
    assert torch.equal(back[0].weight, there[0].weight)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same", "kernel_size": 4},
        {"padding": "same", "kernel_size": (3, 2), "dilation": 2},
        {"padding": (2, 1), "stride": (1, 2), "kernel_size": (3, 2)},
        {"padding": "valid", "groups": 2, "kernel_size": 2},
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", ["kernel", "ws_group"])
def test_settings_of_the_convolution_survive(options, name):
    conv = nn.Conv2d(4, 6, **options)
    model, _ = models.convert(nn.Sequential(conv, nn.BatchNorm2d(6)), normalizers.create(name))
    assert model(X).shape == conv(X).shape
    if name == "kernel":
        reference = KNConv2d(
            4,
            6,
            conv.kernel_size,
            padding=tuple(conv._reversed_padding_repeated_twice),
            stride=conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
        )
        reference.load_state_dict(conv.state_dict())
        torch.testing.assert_close(model.eval()(X), reference.eval()(X))


class PreActivation(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.act = act
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        return x + self.conv(self.act(self.bn(x)))


class FunctionalAct(nn.Module):
    def forward(self, x):
        return F.relu(x, inplace=True)


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), FunctionalAct()])
@pytest.mark.parametrize("name", ["kernel", "none"])
def test_in_place_activations_do_not_write_into_the_shortcut(act, name):
    source = PreActivation(act)
    model, report = models.convert(
        source, normalizers.create(name, **({} if name == "none" else {"dropout_p": 0.0}))
    )
    stem = source.first(X)
    assert report.traced
    if name == "none":
        by_hand = stem + source.conv(stem.relu())
    else:
        conv = KNConv2d(4, 4, 3, padding=1, dropout_p=0.0)
        conv.load_state_dict(source.conv.state_dict())
        by_hand = stem + conv(stem.relu())
        assert type(model.first) is nn.Conv2d
    torch.testing.assert_close(model(X), by_hand)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 6, 3)
        self.bn1 = nn.BatchNorm2d(6)
        self.bn2 = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 4, 3)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        if x.mean() > 100:
            return x
        return self.conv2(self.act(self.bn2(x)))


def test_what_cannot_be_traced_is_read_in_module_order():
    model, report = models.convert(Untraceable(), KERNEL)
    assert not report.traced
    assert "cannot be traced" in str(report)
    assert isinstance(model.conv1, KNConv2d)
    assert isinstance(model.conv2, KNConv2d)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not model.act.inplace
    assert model(X).shape == (2, 4, 5, 5)


def reasons(model, normalizer=KERNEL):
    _, report = models.convert(model, normalizer)
    return {kept.name: kept.reason for kept in report.kept}


def test_what_is_left_alone_says_why():
    assert "padding_mode='circular'" in reasons(conv_bn(padding=1, padding_mode="circular"))["0"]
    assert "no norm stands beside it" in reasons(nn.Sequential(nn.Conv2d(4, 4, 1)))["0"]
    assert "image maps" in reasons(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))["1"]
    kernel = nn.Sequential(KNConv2d(4, 4, 1), KernelNorm2d(1))
    assert set(reasons(kernel, GROUP)) == {"0", "1"}

    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    assert "forward of its own" in reasons(nn.Sequential(Own(4, 4, 1), nn.BatchNorm2d(4)))["0"]


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Rescaled(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.clone())


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(4, 1, 1))

    def forward(self, x):
        return x * self.scale


def test_a_norm_that_does_more_than_normalize_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NormAndActivation(4), nn.Conv2d(4, 4, 1))
    converted, report = models.convert(model, KERNEL)
    assert type(converted[1]) is NormAndActivation
    assert {kept.name for kept in report.kept} == {"0", "1", "2"}
    assert "forward of its own" in reasons(model)["1"]
    same, _ = models.convert(nn.Sequential(nn.Conv2d(3, 4, 1), Rescaled(2, 4)), KERNEL)
    assert [type(m) for m in same] == [KNConv2d, nn.Identity]


def test_what_may_be_a_norm_of_another_kind_is_named():
    found = reasons(nn.Sequential(nn.Conv2d(3, 4, 1), Frozen(), nn.ReLU(), nn.PReLU()))
    assert "its class is not known" in found["1"]
    assert set(found) == {"0", "1"}
    ours = models.build(
        "resnet8", num_classes=3, in_channels=3, normalizer=normalizers.create("frn"), width=8
    )
    norms = [name for name, m in ours.named_modules() if "FilterResponse" in type(m).__name__]
    assert norms
    assert set(norms) <= set(reasons(ours))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_that_kernel_norm_knows_is_taken_over(mode):
    model = conv_bn(padding=1, padding_mode=mode)
    converted, _ = models.convert(model, KERNEL)
    assert isinstance(converted[0], KNConv2d)
    assert converted[0].padding_mode == mode
    conv = model[0]
    twin = KNConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        padding=1,
        padding_mode=mode,
        dropout_p=converted[0].dropout_p,
    ).eval()
    twin.weight, twin.bias = conv.weight, converted[0].bias
    x = torch.randn(2, conv.in_channels, 5, 5)
    assert torch.equal(converted[0].eval()(x), twin(x))


def test_weights_that_are_computed():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))
    assert "its weight is computed" in reasons(model)["0"]
    model(torch.randn(2, 4, 3, 3))
    assert "its weight is computed" in reasons(model)["0"]
    model.last = [model(torch.randn(2, 4, 3, 3))]
    with pytest.raises(UserError, match="cannot be copied"):
        models.convert(model, KERNEL)


def test_a_circular_convolution_keeps_a_norm_of_its_own():
    model, _ = models.convert(conv_bn(padding=1, padding_mode="circular"), KERNEL)
    assert [type(m) for m in model] == [nn.Conv2d, KernelNorm2d, nn.ReLU]


def test_shared_layers_stay_shared():
    norm = nn.BatchNorm2d(4)
    conv = nn.Conv2d(4, 4, 1)
    model, _ = models.convert(nn.Sequential(conv, norm, conv, norm), GROUP)
    assert model[0] is model[2]
    assert model[1] is model[3]
    assert isinstance(model[1], nn.GroupNorm)
    assert model(X).shape == X.shape
    kernel, _ = models.convert(nn.Sequential(conv, norm, conv, norm), KERNEL)
    assert isinstance(kernel[1], KernelNorm2d)
    assert kernel[1] is kernel[3]


def test_mode_dtype_and_a_bare_norm():
    model, _ = models.convert(conv_bn().double().eval(), normalizers.create("group", groups=3))
    assert not model[1].training
    assert model[1].weight.dtype is torch.float64
    bare, _ = models.convert(nn.BatchNorm2d(4), GROUP)
    assert isinstance(bare, nn.GroupNorm)


def test_groups_that_do_not_divide():
    with pytest.raises(UserError, match="does not divide 6 channels"):
        models.convert(conv_bn(), normalizers.create("group", groups=4))
