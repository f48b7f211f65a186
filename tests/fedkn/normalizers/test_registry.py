import pytest

from fedkn import normalizers
from fedkn.errors import UserError


def test_every_name_creates_a_normalizer_of_that_name():
    for name in normalizers.names():
        normalizer = normalizers.create(name)
        assert normalizer.name == name
        assert normalizer.title
        assert normalizer.paper


@pytest.mark.parametrize("name", normalizers.names())
def test_each_says_of_itself_when_it_does_not_help(name):
    said = normalizers.create(name).not_for
    assert said == vars(type(normalizers.create(name)))["not_for"], "inherited from another"
    assert said.count(". ") == 0
    assert said.endswith(".")
    assert "|" not in said


def test_options_and_settings_are_its_fields():
    group = normalizers.create("group", groups=4)
    assert group.options() == {"groups": 0, "channels_per_group": 0}
    assert group.settings == {"groups": 4, "channels_per_group": 0}
    assert normalizers.create("rms").options() == normalizers.create("rms").settings == {}


def test_settings_go_to_those_that_have_an_option_for_them():
    given = {"dropout_p": 0.3, "groups": 2}
    assert normalizers.create("kernel").with_settings(**given).settings["dropout_p"] == 0.3
    assert normalizers.create("group").with_settings(**given).settings["groups"] == 2
    assert normalizers.create("rms").with_settings(**given) == normalizers.create("rms")
    with pytest.raises(UserError, match="below 1"):
        normalizers.create("kernel").with_settings(dropout_p=1.0)


def test_needs_are_stated():
    needs = {n: normalizers.create(n).minimum_batch for n in normalizers.names()}
    needy = {n: smallest for n, smallest in needs.items() if smallest > 1}
    assert needy == dict.fromkeys(("batch", "brn", "ghost", "fedbn", "silobn", "fixbn", "mabn"), 2)
    unit = {n for n in normalizers.names() if normalizers.create(n).published_scaling == "unit"}
    assert unit == {"kernel", "ws_kernel"}


def test_configured_normalizers_are_values():
    assert normalizers.create("group", groups=4) == normalizers.create("group", groups=4)
    assert normalizers.create("group", groups=4) != normalizers.create("ws_group", groups=4)
    assert len({normalizers.create("kernel"), normalizers.create("kernel")}) == 1


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("kernal", {}, "did you mean 'kernel'"),
        ("group", {"group": 4}, "did you mean 'groups'"),
        ("kernel", {"dropout": 0.1}, "did you mean 'dropout_p'"),
        ("none", {"groups": 4}, "no options"),
        ("batch", {"bn_statistics": "average"}, "did you mean 'averaged'"),
        ("fixbn", {"frozen_from": -1}, "frozen_from = -1"),
        ("fixbn", {"frozen_from": 1.5}, "a whole number"),
        ("fbn", {"pooling_momentum": 0.0}, "pooling_momentum = 0.0 of normalizer 'fbn'"),
        ("hbn", {"pooling_momentum": float("nan")}, "at most 1"),
        ("group", {"groups": -1}, "groups = -1"),
        ("group", {"groups": 2.0}, "whole number"),
        ("ws_group", {"groups": 4, "channels_per_group": 4}, "not both"),
        ("kernel", {"dropout_p": 1.0}, "below 1"),
        ("kernel", {"dropout_p": float("nan")}, "below 1"),
        ("kernel", {"eval_mode": "expect"}, "did you mean 'expected'"),
    ],
)
def test_bad_input_is_one_line_that_names_the_fix(name, settings, words):
    with pytest.raises(UserError, match=words) as caught:
        normalizers.create(name, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "label"),
    [
        ("batch", {}, "BatchNorm (statistics averaged)"),
        ("batch", {"bn_statistics": "recalibrated"}, "BatchNorm (statistics recalibrated)"),
        ("fedbn", {}, "FedBN"),
        ("silobn", {}, "SiloBN"),
        ("fixbn", {}, "FixBN (never frozen)"),
        ("fbn", {}, "FBN (pooling momentum 0.1)"),
        ("hbn", {"pooling_momentum": 0.5}, "HBN (pooling momentum 0.5)"),
        ("fixbn", {"frozen_from": 8}, "FixBN (frozen from round 8)"),
        ("group", {}, "GroupNorm (at most 8 groups)"),
        ("group", {"groups": 4}, "GroupNorm (4 groups)"),
        ("group", {"channels_per_group": 16}, "GroupNorm (16 channels per group)"),
        ("kernel", {}, "KernelNorm (dropout as published)"),
        (
            "kernel",
            {"dropout_p": 0.1, "eval_mode": "plain"},
            "KernelNorm (dropout 0.1, plain evaluation)",
        ),
        (
            "ws_kernel",
            {"dropout_p": 0.0, "gain": True},
            "weight standardization + KernelNorm (dropout 0.0, with a gain)",
        ),
    ],
)
def test_labels_state_what_results_depend_on(name, settings, label):
    assert normalizers.create(name, **settings).label == label
