"""A normalizer of somebody's own: by reference, with options, and what is refused of it."""

from __future__ import annotations

import pytest
from torch import nn

from fedkn import models, normalizers
from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from fedkn.experiment import normalizer_of
from simulations.comparison.grid import GridConfig, groups, result_cells
from tests.own_parts import HalfNorm

OWN = "tests.own_parts:HalfNorm"


def test_it_is_made_by_reference_with_its_options():
    made = normalizers.create(OWN, parts=4)
    assert made == HalfNorm(4)
    model = models.build("resnet8", num_classes=3, in_channels=1, normalizer=made, width=8)
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {4}
    assert set(made.federation_rule(model).values()) == {"shared"}
    config = ExperimentConfig.resolve({"normalizer.name": OWN, "normalizer.options.parts": 4})
    assert normalizer_of(config) == HalfNorm(4)


def test_options_without_a_setting_reach_fedkns_own():
    config = ExperimentConfig.resolve({"normalizer.options.eval_mode": "plain"})
    assert normalizer_of(config).settings["eval_mode"] == "plain"
    again = ExperimentConfig.resolve({"normalizer": {"name": "group", "options": {"groups": 2}}})
    with pytest.raises(UserError, match=r"normalizer\.options\.groups is a setting"):
        normalizer_of(again)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tests.own_parts:Untold", "is no class made from"),
        ("tests.own_parts:HalfNorms", "has no attribute"),
        ("grup", "did you mean 'group'"),
    ],
)
def test_what_is_none_is_refused(name, said):
    with pytest.raises(UserError, match=said):
        normalizers.create(name)


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'parts'"):
        normalizers.create(OWN, part=3)


def test_in_a_comparison_each_takes_the_options_that_it_has_and_names_are_those_of_files():
    grid = GridConfig.resolve(
        {
            "compare.normalizers": f"{OWN},kernel",
            "normalizer.options.parts": 4,
            "compare.learning_rates": "0.1",
            "compare.batch_sizes": 2,
            "model.width": 8,
        }
    )
    own, kernel = groups(grid)
    assert own.id == "tests.own_parts-HalfNorm-b2-dirichlet0.3"
    (cell, *_), (other, *_) = (result_cells(grid, group, 0.1) for group in (own, kernel))
    assert cell.config.normalizer.name == OWN
    assert normalizer_of(cell.config) == HalfNorm(4)
    assert other.config.normalizer.options == ""
    with pytest.raises(UserError, match="unknown option of these normalizers 'prats'"):
        GridConfig.resolve({"compare.normalizers": f"{OWN},kernel", "normalizer.options.prats": 4})
