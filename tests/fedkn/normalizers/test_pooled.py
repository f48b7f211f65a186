"""FBN and HBN: statistics that the server pools."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedkn import models, normalizers
from fedkn.averaging import moment_pairs, pool_moments
from fedkn.normalizers import TensorRole


def network(name):
    return models.build(
        "resnet8",
        num_classes=3,
        in_channels=1,
        width=4,
        normalizer=normalizers.create(name),
        final_norm="own",
        seed=0,
    ).double()


def forward_of(model, images):
    @torch.no_grad()
    def forward(batch_size):
        for start in range(0, len(images), batch_size):
            model(images[start : start + batch_size])

    return forward


def norms_of(model) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "running_mean")}


def inputs_of(model, batches) -> dict[str, Tensor]:
    """Return by layer the values that reached it in `batches`: (channels, values)."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        norm.register_forward_pre_hook(
            lambda _, x, name=name: seen.setdefault(name, []).append(x[0].transpose(0, 1))
        )
        for name, norm in norms_of(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([v.flatten(1) for v in parts], 1) for name, parts in seen.items()}


@pytest.mark.parametrize(("name", "extra"), [("fbn", {}), ("hbn", {"mixing": TensorRole.LOCAL})])
def test_roles(name, extra):
    normalizer = normalizers.create(name)
    rule = normalizer.federation_rule(nn.Sequential(normalizer.norm(3), nn.Linear(3, 3)))
    roles = {
        "weight": TensorRole.SHARED,
        "bias": TensorRole.SHARED,
        **extra,
        "running_mean": TensorRole.MEAN,
        "running_var": TensorRole.VARIANCE,
    }
    expected = {f"0.{key}": role for key, role in roles.items()}
    assert rule == expected | {"1.weight": TensorRole.SHARED, "1.bias": TensorRole.SHARED}


@pytest.mark.parametrize(
    ("name", "settings", "weights"),
    [
        ("fbn", {}, {1: 1, 2: 1 / 2, 9: 1 / 9, 10: 0.1, 11: 0.1, 500: 0.1}),
        ("fbn", {"pooling_momentum": 0.4}, {1: 1, 2: 1 / 2, 3: 0.4}),
        ("hbn", {}, {1: 1, 2: 1, 30: 1}),
        ("batch", {"bn_statistics": "recalibrated"}, {1: 1, 2: 1, 30: 1}),
    ],
)
def test_the_weight_of_what_a_round_pools(name, settings, weights):
    normalizer = normalizers.create(name, **settings)
    layer = nn.Sequential(normalizer.norm(3))
    seen = {r: normalizer.federation_rule(layer, r).pooling_weight for r in weights}
    assert seen == weights


def test_fbns_pooled_moments_are_those_of_all_clients_batches():
    normalizer = normalizers.create("fbn")
    model = network("fbn").train()
    sent = {k: v.clone() for k, v in model.state_dict().items()}
    clients = [torch.randn(n, 1, 8, 8, dtype=torch.float64) * n - n for n in (5, 1, 8)]
    updates, union = [], {}
    for images in clients:
        model.load_state_dict(sent)
        normalizer.begin_training(model, 1)
        for name, values in inputs_of(model, torch.split(images, 2)).items():
            union[name] = torch.cat([union[name], values], 1) if name in union else values
        normalizer.end_training(model, forward_of(model, images), 1)
        updates.append({k: v.numpy().copy() for k, v in model.state_dict().items()})
    pairs = moment_pairs(normalizer.federation_rule(model))
    assert len(pairs) == len(norms_of(model))
    before = {k: v.numpy() for k, v in sent.items()}
    pooled = pool_moments(pairs, before, updates, [len(c) for c in clients], 1.0)
    for name, values in union.items():
        mean, variance = (torch.from_numpy(pooled[f"{name}.running_{k}"]) for k in ("mean", "var"))
        torch.testing.assert_close(mean, values.mean(1), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(variance, values.var(1, correction=0), rtol=1e-6, atol=1e-9)


def test_hbn_measures_at_rest_and_in_training_mode():
    normalizer = normalizers.create("hbn")
    model = network("hbn")
    for norm in norms_of(model).values():
        nn.init.normal_(norm.mixing)
    images = torch.randn(20, 1, 8, 8, dtype=torch.float64) * 3 + 1
    expected = inputs_of(model.train(), [images])
    others = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}
    normalizer.end_training(model, forward_of(model, images), 1)
    for name, norm in norms_of(model).items():
        values = expected[name]
        torch.testing.assert_close(norm.running_mean, values.mean(1))
        torch.testing.assert_close(norm.running_var, values.var(1, correction=0))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in others.items())
    assert model.training


def test_a_round_of_fbn_starts_from_nothing_and_may_see_nothing():
    normalizer = normalizers.create("fbn")
    model = network("fbn").train()
    model(torch.randn(2, 1, 8, 8, dtype=torch.float64))
    normalizer.begin_training(model, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    normalizer.end_training(model, forward_of(model, torch.empty(0)), 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
