import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune

from fedkn import models, normalizers
from fedkn.errors import UserError
from tests.fedkn.models.test_conversion import NormAndActivation, PreActivation, Untraceable


def unsettled(model, seed=0):
    """Give every batch norm statistics and scales far from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return model


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2"])
def test_outputs_are_those_of_evaluation(name, torchvision):
    model = unsettled(getattr(torchvision.models, name)(weights=None, num_classes=5)).double()
    folded, report = models.fold_batch_norm(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-9, atol=1e-9)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert left == len(report.kept)
    assert left == (62 if name == "densenet121" else 0)


def test_our_own_networks_fold():
    model = unsettled(
        models.build(
            "resnet8",
            num_classes=3,
            in_channels=1,
            normalizer=normalizers.create("batch"),
            width=4,
        )
    )
    folded, report = models.fold_batch_norm(model)
    assert len(report.changed) == 7
    assert not report.kept
    x = torch.randn(3, 1, 16, 16)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert not any(m.training for m in folded.modules())


def test_the_original_is_left_alone():
    model = unsettled(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    models.fold_batch_norm(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_only_a_norm_right_after_its_convolution_is_folded():
    folded, report = models.fold_batch_norm(PreActivation(nn.ReLU()))
    assert isinstance(folded.bn, nn.BatchNorm2d)
    assert "what 'first' gives is read elsewhere" in report.kept[0].reason
    bare = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    assert "no running statistics" in models.fold_batch_norm(bare)[1].kept[0].reason


def test_a_norm_that_does_more_than_normalize_is_not_folded():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), NormAndActivation(2))
    folded, report = models.fold_batch_norm(unsettled(model))
    assert "forward of its own" in report.kept[0].reason
    x = torch.randn(2, 2, 3, 3)
    assert torch.equal(folded(x), model.eval()(x))


def test_two_norms_on_one_weight():
    first, second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
    second.weight = first.weight
    model = nn.Sequential(first, nn.BatchNorm2d(2), second, nn.BatchNorm2d(2))
    folded, _ = models.fold_batch_norm(unsettled(model))
    x = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_without_a_trace_nothing_is_folded():
    with pytest.raises(UserError, match="cannot be traced"):
        models.fold_batch_norm(Untraceable())


def conv_norm(channels=4):
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels))


def folds(model, *inputs):
    """Fold, hold the outputs against those of evaluation, return the reasons for what is kept."""
    unsettled(model)
    inputs = inputs or (torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)),)
    with torch.no_grad():
        training = [m.training for m in model.modules()]
        folded, report = models.fold_batch_norm(model, inputs)
        assert training == [m.training for m in model.modules()]
        expected = model.eval()(*inputs)
        torch.testing.assert_close(folded(*inputs), expected, rtol=1e-4, atol=1e-5)
    left = [name for name, m in folded.named_modules() if isinstance(m, _BatchNorm)]
    assert sorted(left) == sorted(kept.name for kept in report.kept)
    return {kept.name: kept.reason for kept in report.kept}


class Reads(nn.Module):
    """Convolution and norm, and a forward that also reads a tensor of one of them by `read`."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.held = [self.conv.weight]
        self.read = read

    def forward(self, x):
        return self.norm(self.conv(x)).relu() + self.read(self)


READS = {
    "weight": lambda m: m.conv.weight.mean(),
    "bias": lambda m: m.conv.bias.sum(),
    "scale": lambda m: m.norm.weight.sum(),
    "running mean": lambda m: m.norm.running_mean.view(1, -1, 1, 1),
    "counter": lambda m: m.norm.num_batches_tracked.float(),
    "by another way": lambda m: dict(m.named_parameters())["conv.weight"].mean(),
    "of the dict": lambda m: m.norm._buffers["running_var"].mean(),
    "detached": lambda m: m.conv.weight.detach().mean().item(),
    "all": lambda m: sum(p.mean() for p in m.parameters()),
}


@pytest.mark.parametrize("read", READS)
def test_tensors_that_the_forward_reads_itself(read):
    reasons = folds(Reads(READS[read]))
    assert list(reasons) == ["norm"]
    assert "reads tensors of" in reasons["norm"] or "outputs change" in reasons["norm"]


def test_a_tensor_that_is_held_elsewhere_does_not_change():
    assert not folds(Reads(lambda m: m.held[0].mean()))


class TiedDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.encode2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        hidden = self.norm2(self.encode2(self.norm(self.encode(x)).relu())).relu()
        return F.conv_transpose2d(hidden, self.encode.weight, padding=1)


class TiedModule(nn.Module):
    """The decoder is a module whose weight is the encoder's."""

    def __init__(self):
        super().__init__()
        self.encode, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.decode = nn.ConvTranspose2d(8, 3, 3, padding=1)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.norm(self.encode(x)).relu())


def test_a_tied_decoder():
    assert list(folds(TiedDecoder())) == ["norm"]
    assert not folds(TiedModule())


class Crossed(nn.Module):
    """Registered in another order than called, one norm after an addition."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.norm_a = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.c, self.norm_c = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        sides = self.norm_a(self.a(x)) - self.norm_b(self.b(x)).relu()
        return self.norm_c(self.c(sides) + sides)


def test_the_data_flow_counts_not_the_order_of_modules():
    reasons = folds(Crossed())
    assert reasons == {"norm_c": "no convolution stands right before it"}


class Twice(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.step = forward

    def forward(self, x):
        return self.step(self, x)


def _in_place(m, x):
    y = m.conv(x)
    y.mul_(2)
    return m.norm(y)


TWICE = {
    "convolution": (lambda m, x: m.norm(m.conv(m.conv(x))), "is called 2 times"),
    "norm": (lambda m, x: m.norm(m.conv(m.norm(x))), "called 2 times"),
    "two norms": (lambda m, x: m.norm(m.conv(x)) + m.other(m.conv(x)), "is called 2 times"),
    "output": (lambda m, x: m.norm(m.conv(x)) + m.conv.weight.new_ones(1), "reads tensors"),
    "map": (lambda m, x: m.norm(y := m.conv(x)) + y, "read elsewhere as well"),
    "in place": (_in_place, "read elsewhere as well"),
    "unused": (lambda m, x: m.conv(x), "nothing calls it"),
    "early": (lambda m, x: {"maps": (y := m.conv(x)), "out": m.norm(y)}, "read elsewhere"),
}


@pytest.mark.parametrize("case", TWICE)
def test_what_is_used_more_than_once(case):
    forward, words = TWICE[case]
    reasons = folds(Twice(forward))
    assert words in reasons["norm"]


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
    "forward, changing": lambda m, seen: m.register_forward_hook(
        lambda _m, _args, out: seen.append(1) or out * 2
    ),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
    "keywords": lambda m, seen: m.register_forward_hook(
        lambda *_: seen.append(1), with_kwargs=True
    ),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1)),
    "tensor": lambda m, seen: m.weight.register_hook(lambda *_: seen.append(1)),
    "accumulated": lambda m, seen: m.weight.register_post_accumulate_grad_hook(
        lambda *_: seen.append(1)
    ),
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("hook", HOOKS)
def test_layers_with_hooks_stay_and_keep_them(hook, place):
    model, seen = conv_norm(), []
    HOOKS[hook](model[place], seen)
    reasons = folds(model)
    assert "hooks" in reasons["1"]
    assert ("of the convolution '0'" in reasons["1"]) == (place == 0)
    folded, _ = models.fold_batch_norm(model)
    seen.clear()
    folded(torch.randn(2, 3, 9, 9, requires_grad=True)).sum().backward()
    assert seen


def test_a_hook_on_what_holds_the_layers_still_works():
    inner = conv_norm()
    inner.register_forward_hook(lambda _m, _args, out: out * 2)
    assert not folds(nn.Sequential(inner, nn.ReLU()))
    first = nn.Sequential(nn.Conv2d(3, 4, 1))
    first.register_forward_hook(lambda _m, _args, out: out.sigmoid())
    reasons = folds(nn.Sequential(first, nn.BatchNorm2d(4)))
    assert "outputs change" in reasons["1"]


def _parametrized(model, place, tensor):
    class Twofold(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(model[place], tensor, Twofold())
    return model


COMPUTED = {
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    "spectral_norm": lambda m: nn.utils.parametrizations.spectral_norm(m[0]),
    "old weight_norm": lambda m: nn.utils.weight_norm(m[0]),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m[0]),
    "pruned": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    "bias": lambda m: _parametrized(m, 0, "bias"),
    "scale": lambda m: _parametrized(m, 1, "weight"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("name", COMPUTED)
def test_tensors_that_are_computed(name):
    model = conv_norm()
    COMPUTED[name](model)
    (reason,) = folds(model).values()
    assert "computed" in reason


def test_a_forward_put_into_one_layer():
    model = conv_norm()
    plain = model[0].forward
    model[0].forward = lambda x: plain(x).tanh()
    assert "forward of its own" in folds(model)["1"]


class StaysInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def train(self, mode=True):
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, x):
        return self.norm(self.conv(x))


class SetsTraining(StaysInTraining):
    def train(self, mode=True):
        return nn.Module.train(self, mode)

    def forward(self, x):
        return self.norm.train()(self.conv(x))


def test_norms_that_stay_in_training_mode():
    assert "training mode" in folds(StaysInTraining())["norm"]
    assert "outputs change" in folds(SetsTraining())["norm"]


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = conv_norm()

    def forward(self, x):
        return self.parts(x.float())


def test_a_model_that_insists_on_its_dtype():
    assert not folds(Casting())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts, self.fc = conv_norm(), nn.Linear(5, 4)

    def forward(self, x, condition):
        return self.parts(x) + self.fc(condition)[..., None, None]


def test_models_that_take_something_else_than_images():
    assert not folds(TwoInputs(), torch.randn(2, 3, 6, 6), torch.randn(2, 5))
    with pytest.raises(UserError, match="give example_input="):
        models.fold_batch_norm(TwoInputs())
    with pytest.raises(UserError, match="does not take the example_input"):
        models.fold_batch_norm(conv_norm(), torch.randn(2, 4, 6, 6))


def test_a_forward_that_keeps_what_it_sees_leaves_no_mark():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = conv_norm()

        def forward(self, x):
            self.last = self.parts(x)
            return self.last

    folded, _ = models.fold_batch_norm(Keeps())
    assert not hasattr(folded, "last")
    converted, _ = models.convert(Keeps(), normalizers.create("kernel"))
    assert not hasattr(converted, "last")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_the_meta_device(dtype):
    folded, report = models.fold_batch_norm(conv_norm().to(dtype))
    assert report.changed
    assert {p.dtype for p in folded.parameters()} == {dtype}
    folded, report = models.fold_batch_norm(conv_norm().to("meta"))
    assert report.changed
    assert folded(torch.empty(1, 3, 8, 8, device="meta")).shape == (1, 4, 8, 8)


def test_frozen_and_lazy_layers():
    model = conv_norm().requires_grad_(False)
    folded, _ = models.fold_batch_norm(model)
    assert not any(p.requires_grad for p in folded.parameters())
    with pytest.raises(UserError, match="'0' of the model has no shape yet"):
        models.fold_batch_norm(nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d()))
