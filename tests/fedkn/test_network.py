"""A user's own network in an experiment: built, converted, seeded, given weights, frozen."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedkn import models, normalizers
from fedkn.config import ExperimentConfig, ModelConfig
from fedkn.errors import UserError
from fedkn.federation import fixed_sha256
from fedkn.network import build_network, pinned_weights
from fedkn.normalizers import TensorRole
from tests.own_parts import Plain

OWN = "tests.own_parts:"
SHAPE = (1, 8, 8)


def network(name="Plain", normalizer="batch", *, seed=0, shape=SHAPE, **settings):
    settings.setdefault("options", {})
    config = ExperimentConfig.resolve(
        {"model": {"name": name if name == "resnet8" else OWN + name, **settings}}
    )
    return build_network(
        config.model, normalizers.create(normalizer), outputs=10, shape=shape, seed=seed
    )


def tensors(built):
    return built.module.state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    "name", ["Plain", "with_blocks", "asked", "lazy", "lazy_norms", "Attention"]
)
def test_the_initial_weights_are_a_function_of_the_seed_alone(name):
    torch.manual_seed(1)
    first = tensors(network(name, seed=3))
    state = torch.get_rng_state()
    torch.rand(7)
    again = tensors(network(name, seed=3))
    assert equal(first, again)
    assert not equal(first, tensors(network(name, seed=4)))
    torch.set_rng_state(state)
    following = torch.rand(3)
    torch.set_rng_state(state)
    network(name, seed=3)
    assert torch.equal(following, torch.rand(3))  # nothing outside notices


def test_a_network_without_the_normalizer_is_converted_and_keeps_its_weights():
    built = {name: network(normalizer=name) for name in ("batch", "group", "kernel", "none")}
    kinds = {name: type(b.module.bn1).__name__ for name, b in built.items()}
    assert kinds == {
        "batch": "BatchNorm2d", "group": "GroupNorm", "kernel": "Identity", "none": "Identity",
    }  # fmt: skip
    weights = [built[name].module.conv1.weight for name in built]
    assert all(torch.equal(weights[0], other) for other in weights)
    assert len(built["group"].conversion.changed) == 2
    assert type(built["kernel"].module.conv1).__name__ == "KNConv2d"
    record = built["kernel"].record()["conversion"]
    assert ["bn1", "BatchNorm2d", "Identity", ""] in record["changed"]
    assert record["traced"]


def test_weights_that_a_factory_sets_itself_are_kept():
    assert torch.equal(
        network("pretrained", "group").module.conv1.weight, torch.full((8, 1, 3, 3), 0.25)
    )


def test_a_network_of_the_blocks_begins_alike_whatever_the_normalizer():
    networks = [network("with_blocks", name).module for name in ("batch", "kernel", "sws")]
    assert all(b.conversion is None for b in (network("with_blocks", "kernel"),))
    convolutions = [
        [m.weight for m in n.modules() if hasattr(m, "weight") and m.weight.dim() == 4]
        for n in networks
    ]
    assert all(torch.equal(a, b) for a, b in zip(*convolutions[:2], strict=True))
    assert all(torch.equal(n[-1].weight, networks[0][-1].weight) for n in networks)


def test_a_factory_is_given_what_it_asks_for():
    assert network("asked").module[1].weight.shape == (10, 64)
    wide = network("Plain", options={"width": 12}).module
    assert wide.conv1.weight.shape == (12, 1, 3, 3)
    own = network("Plain", options={"num_classes": 4}).module  # an option comes before an offer
    assert own.fc.out_features == 4
    assert network("lazy").module[0].weight.shape == (4, 1, 3, 3)


@pytest.mark.parametrize("normalizer", ["none", "batch", "group", "kernel"])
def test_lazy_norms_learn_their_shapes_and_are_then_converted(normalizer):
    built = network("lazy_norms", normalizer)
    assert built.module(torch.rand(2, *SHAPE)).shape == (2, 10)
    kept = [type(layer).__name__ for layer in built.module if "BatchNorm" in type(layer).__name__]
    assert kept == (["BatchNorm2d"] if normalizer == "batch" else [])


def test_a_network_that_the_factory_keeps_is_not_the_one_trained():
    one, other = (network("cached").module for _ in range(2))
    with torch.no_grad():
        one[1].weight.zero_()
    assert other[1].weight.abs().max() > 0
    assert network("cached").module[1].weight.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("needs", {}, "also needs depth"),
        ("fails", {}, "no network for 10 classes"),
        ("number", {}, "made an int, not a torch.nn.Module"),
        ("NETWORK", {}, "a network already made"),
        ("Plain", {"options": {"widht": 3}}, "did you mean 'width'"),
        ("cached", {"options": {"width": 3}}, "takes no options"),
        ("Plain", {"options": {"normalizer": "x"}}, "set normalizer.name"),
        ("Plain", {"width": 3}, "model.width = 3 is for fedkn's own"),
        ("Plain", {"low_resolution": True}, "model.low_resolution = True is for fedkn's own"),
        ("Plain", {"final_norm": "own"}, "model.final_norm = own is for fedkn's own"),
        ("Plain", {"options": {"in_channels": "x"}}, "cannot be built"),
        ("resnet8", {"options": {"width": 3}}, "model.options are for a model of your own"),
        ("Plain", {"frozen": "conv3.*"}, "did you mean 'conv"),
        ("Plain", {"frozen": "*"}, "leaves no parameter to train"),
        ("Plain", {"weights": "there-is-none.pt"}, "cannot read"),
        ("Plain", {"weights_except": "fc.*"}, "need model.weights"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(name, settings, said):
    with pytest.raises(UserError, match=said) as error:
        network(name, **settings)
    assert "\n" not in str(error.value)


def test_published_names_have_their_published_width_and_the_stem_follows_the_images():
    def stem(shape, **settings):
        config = ModelConfig(name="resnet18", **settings)
        module = build_network(
            config, normalizers.create("batch"), outputs=10, shape=shape, seed=0
        ).module
        return next(m for m in module.modules() if isinstance(m, nn.Conv2d))

    assert (
        sum(
            p.numel()
            for p in build_network(
                ModelConfig(name="resnet18", final_norm="none"),
                normalizers.create("batch"),
                outputs=10,
                shape=(3, 32, 32),
                seed=0,
            ).module.parameters()
        )
        == 11_173_962
    )  # torchvision's, with a 3x3 stem and 10 classes
    assert stem((3, 64, 64)).kernel_size == (3, 3)
    assert stem((3, 65, 40)).kernel_size == (7, 7)
    assert stem((3, 224, 224), low_resolution=True).kernel_size == (3, 3)
    assert stem((3, 32, 32), low_resolution=False).kernel_size == (7, 7)
    # What has one form alone has that.
    build_network(
        ModelConfig(width=4), normalizers.create("batch"), outputs=2, shape=(1, 90, 90), seed=0
    )


# -- given weights ---------------------------------------------------------------------------------


@pytest.fixture
def trained():
    torch.manual_seed(5)
    module = Plain(10)
    module.bn1.running_mean.normal_()
    return module


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "nested", "half"])
def test_weights_are_those_of_the_file_before_a_conversion(tmp_path, trained, kind):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    state = trained.state_dict()
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "half":
        torch.save({n: t.half() if t.is_floating_point() else t for n, t in state.items()}, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "nested" else state, path)
    built = network(weights=str(path))
    tolerance = 1e-3 if kind == "half" else 0
    for name, value in tensors(built).items():
        torch.testing.assert_close(value, state[name], rtol=tolerance, atol=tolerance)
    assert built.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    kernel = network(normalizer="kernel", weights=str(path)).module
    torch.testing.assert_close(
        kernel.conv1.weight, state["conv1.weight"], rtol=tolerance, atol=tolerance
    )


def test_a_head_of_another_size_is_left_out_by_name(tmp_path, trained):
    trained.fc = nn.Linear(8, 1000)
    path = tmp_path / "w.safetensors"
    save_file(trained.state_dict(), path)
    with pytest.raises(UserError, match=r"'fc.bias' is \(1000,\), the model's is \(10,\)"):
        network(weights=str(path))
    built = network(weights=str(path), weights_except="fc.*")
    assert torch.equal(built.module.conv1.weight, trained.conv1.weight)
    assert torch.equal(built.module.fc.weight, network().module.fc.weight)  # as initialised
    assert built.record()["weights"]["left"] == ["fc.bias", "fc.weight"]
    with pytest.raises(UserError, match=r"model.weights_except 'head.\*'"):
        network(weights=str(path), weights_except="head.*")


def test_what_does_not_fit_is_named(tmp_path, trained):
    path = tmp_path / "w.pt"

    def refused(change):
        state = dict(trained.state_dict())
        change(state)
        torch.save(state, path)
        with pytest.raises(UserError) as error:
            network(weights=str(path))
        return str(error.value)

    assert "nothing for the model's 'bn1.weight'" in refused(lambda s: s.pop("bn1.weight"))
    assert "no tensor 'extra'" in refused(lambda s: s.update(extra=torch.zeros(2)))
    assert "not finite" in refused(lambda s: s["fc.bias"].fill_(float("nan")))
    assert "'fc.bias' is no tensor but of type int" in refused(lambda s: s.update({"fc.bias": 3}))
    damaged = tmp_path / "w.safetensors"
    damaged.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="fetch it again"):
        network(weights=str(damaged))
    torch.save({"fc.bias": Plain}, path)
    with pytest.raises(UserError, match="more than tensors"):
        network(weights=str(path))


def test_the_run_is_held_to_its_file(tmp_path, trained):
    path = tmp_path / "w.safetensors"
    save_file(trained.state_dict(), path)
    pinned = pinned_weights(ModelConfig(weights=str(path)))
    assert pinned["model.weights"] == str(path)
    sha256 = pinned["model.weights_sha256"]
    assert pinned_weights(ModelConfig()) == {}
    network(weights=str(path), weights_sha256=sha256)
    with torch.no_grad():
        trained.fc.bias.add_(1)
    save_file(trained.state_dict(), path)
    with pytest.raises(UserError, match="not the file of weights that the run was begun with"):
        network(weights=str(path), weights_sha256=sha256)
    with pytest.raises(UserError, match=r"not model\.weights_sha256"):
        pinned_weights(ModelConfig(weights=str(path), weights_sha256=sha256))


# -- frozen ----------------------------------------------------------------------------------------


def test_frozen_parameters_and_statistics_have_a_role_of_their_own():
    built = network(frozen="conv1.*, bn1.*")
    rule = normalizers.create("batch").federation_rule(built.module)
    fixed = {name for name, role in rule.items() if role is TensorRole.FIXED}
    assert fixed == {
        "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var",
        "bn1.num_batches_tracked",
    }  # fmt: skip
    assert set(built.frozen) == fixed
    assert not built.module.conv1.weight.requires_grad
    assert built.module.conv2.weight.requires_grad
    record = built.record()
    assert record["parameters"] - record["trained"] == 72 + 16
    assert fixed_sha256(rule, tensors(built))
    assert fixed_sha256(rule, tensors(built)) != fixed_sha256(
        rule, tensors(network(frozen="conv1.*, bn1.*", seed=1))
    )
    unfrozen = network().module
    assert fixed_sha256(normalizers.create("batch").federation_rule(unfrozen), {}) == ""


def test_a_frozen_norm_is_one_function_in_training_and_evaluation():
    module = network(frozen="bn1.*").module
    module.bn1.running_mean.fill_(0.3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(4, 8, 3, 3)
    module.train()
    trained = module.bn1(x)
    assert torch.equal(trained, module.eval().bn1(x))
    assert torch.equal(module.bn1.running_mean, before["bn1.running_mean"])
    module.train()
    module(torch.randn(4, *SHAPE))
    assert not torch.equal(module.bn2.running_mean, before["bn2.running_mean"])
    assert torch.equal(module.bn1.running_var, before["bn1.running_var"])


def test_patterns_may_name_what_another_normalizer_took_away():
    for name in ("batch", "group", "kernel", "none"):
        built = network(normalizer=name, frozen="bn1.*, conv1.*")
        assert not built.module.conv1.weight.requires_grad
        rule = normalizers.create(name).federation_rule(built.module)
        assert rule["conv1.weight"] is TensorRole.FIXED


def test_a_constant_buffer_is_refused_with_the_way_out():
    module = network("indexed", "group").module
    with pytest.raises(UserError, match=r"model\.frozen = 'index'"):
        normalizers.create("group").federation_rule(module)
    frozen = network("indexed", "group", frozen="index").module
    assert normalizers.create("group").federation_rule(frozen)["index"] is TensorRole.FIXED


def test_fedkns_own_networks_can_be_frozen_too():
    config = ModelConfig(width=4, frozen="conv1.*")
    built = build_network(config, normalizers.create("group"), outputs=10, shape=SHAPE, seed=0)
    assert built.frozen
    assert all(name.startswith("conv1.") for name in built.frozen)


def test_initialize_knows_every_convolution():
    networks = [
        nn.Sequential(nn.Conv1d(2, 3, 3), nn.Conv3d(2, 3, 3), nn.Linear(3, 2)) for _ in "ab"
    ]
    for module in networks:
        models.initialize(module, 7)
    assert equal(networks[0].state_dict(), networks[1].state_dict())
