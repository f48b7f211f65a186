"""The tables themselves: each row at each scale is an experiment that fedkn can run."""

import math

import pytest

from fedkn.algorithms import federation_rule
from fedkn.errors import UserError
from fedkn.experiment import normalizer_of
from fedkn.models import build
from fedkn.normalizers import TensorRole
from fedkn.training import refuse_unprivate
from fedkn.training.privacy_spent import PrivacySpent
from server.strategies.registry import create_strategy
from simulations.comparison.grid import GridConfig, cells_in, groups, result_cells
from simulations.reproduction import published

TABLES = published.names()
ROWS = [
    (name, scale, row.name)
    for name in TABLES
    for scale in published.SCALES
    for row in published.table(name).rows
]


def experiment_of(name, scale, row):
    table = published.table(name)
    settings = published.settings_of(table, scale, table.row(row), seeds=3, changes={})
    grid = GridConfig.resolve(settings)
    assert cells_in(grid) == 3
    (group,) = groups(grid)
    return result_cells(grid, group, grid.compare.learning_rates[0])[0].config


def test_the_seven_tables_are_there():
    expected = {"hybridbn", "fedwon", "du", "niid_bench", "kernelnorm", "label_skew", "satml_dp"}
    assert set(TABLES) == expected


@pytest.mark.parametrize(("name", "scale", "row"), ROWS)
def test_every_row_is_an_experiment_that_can_be_run(name, scale, row):
    config = experiment_of(name, scale, row)
    create_strategy(config)
    if scale == "paper":
        return  # the same but for its size
    normalizer = normalizer_of(config)
    model = build(
        config.model.name,
        num_classes=10,
        in_channels=3,
        normalizer=normalizer,
        width=config.model.width or None,
        final_norm=config.model.final_norm,
        low_resolution=True,
    )
    if config.privacy.mechanism == "example":
        refuse_unprivate(normalizer, model, "float32")
    rule = {**normalizer.federation_rule(model), **federation_rule(config, normalizer, model)}
    if TensorRole.LOCAL in rule.values():
        assert config.evaluation.client_fraction > 0


def test_hybridbn_is_what_the_issue_and_the_authors_readme_say():
    rates = {"hbn": 0.01, "bn": 0.01, "fbn": 0.01, "gn": 0.005, "ln": 0.005, "fedfn": 0.005}
    for row, rate in {**rates, "fixbn": 0.002}.items():
        config = experiment_of("hybridbn", "paper", row)
        train, partition = config.train, config.partition
        assert train.learning_rate == rate
        assert (train.batch_size, train.momentum, train.local_epochs) == (4, 0.9, 1)
        assert (train.schedule, train.decay, train.clip_norm) == ("exponential", 0.998, 10)
        assert (partition.scheme, partition.alpha, partition.clients) == ("dirichlet", 0.6, 100)
        assert (config.rounds, config.cohort, config.model.name) == (500, 10, "simple_cnn")
    assert experiment_of("hybridbn", "paper", "gn").normalizer.groups == 2


def test_noise_of_the_private_table_spends_the_epsilon_of_its_row():
    for scale, images in (("small", 2000), ("paper", 50_000)):
        for row in published.table("satml_dp").rows[:4]:
            config = experiment_of("satml_dp", scale, row.name)
            batch = config.train.batch_size
            steps = math.ceil(images / batch) * config.rounds
            spent = PrivacySpent().after(config.privacy.noise_multiplier, batch / images, steps)
            asked = float(row.name.rpartition("e")[2])
            assert 0.98 * asked < spent.epsilon(config.privacy.delta) <= asked


def write(folder, text):
    (folder / "mine.toml").write_text(text)
    return folder


WHOLE = """
title = "t"
paper = "p"
reading = "best"
reading_note = "n"
differences = []
[protocol]
rounds = 2
[scale.small]
note = "s"
seeds = 1
[scale.paper]
note = "p"
seeds = 1
[[rows]]
name = "a"
label = "A"
published = 50.0
"""


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("published = 50.0", "", "reason"),
        ("published = 50.0", "published = 500.0", "100"),
        ('reading = "best"', 'reading = "nicest"', "best"),
        ('[scale.paper]\nnote = "p"\nseeds = 1\n', "", "small and paper"),
        ('name = "a"', 'name = "../a"', "rows.0.name"),
        ('title = "t"', 'title = "t"\nextra = 1', "extra"),
    ],
)
def test_a_table_that_says_too_little_is_refused(tmp_path, before, after, words):
    assert published.table("mine", write(tmp_path, WHOLE)).rows[0].published == 50
    with pytest.raises(UserError, match=words):
        published.table("mine", write(tmp_path, WHOLE.replace(before, after)))


def test_unknown_names_are_told_the_nearest():
    with pytest.raises(UserError, match="hybridbn"):
        published.table("hybridnb")
    with pytest.raises(UserError, match="fixbn"):
        published.table("hybridbn").row("fixbm")
    table = published.table("hybridbn")
    with pytest.raises(UserError, match="paper"):
        published.settings_of(table, "papre", table.rows[0], seeds=1, changes={})
