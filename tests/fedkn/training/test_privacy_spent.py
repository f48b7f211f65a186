"""The privacy spent: a history that adds up, whatever the order, and travels as tensors."""

from __future__ import annotations

import math

import pytest
import torch

from fedkn.training.privacy_spent import PrivacySpent

DELTA = 1e-5


@pytest.mark.parametrize("runs", [[(1.0, 0.04, 25)] * 10, [(1.0, 0.04, 25), (1.3, 0.1, 7)] * 3])
def test_rounds_add_up_to_one_account_through_their_tensors(runs):
    spent = PrivacySpent()
    for run in runs:
        spent = PrivacySpent.restored(spent.tensors()).after(*run)
    kinds = dict.fromkeys(run[:2] for run in runs)
    totals = {kind: sum(run[2] for run in runs if run[:2] == kind) for kind in kinds}
    assert spent.history == tuple((*kind, steps) for kind, steps in totals.items())
    assert spent.epsilon(DELTA) > 1.05 * PrivacySpent().after(*runs[0]).epsilon(DELTA)


def test_a_history_grows_by_kinds_of_steps_not_by_rounds():
    spent = PrivacySpent()
    for round_ in range(100):
        spent = spent.after(1.0, 0.1 + 0.1 * (round_ % 2), 3)
    assert spent.history == ((1.0, 0.1, 150), (1.0, 0.2, 150))


def test_tensors_have_no_need_of_pickle(tmp_path):
    from safetensors.torch import load_file, save_file

    spent = PrivacySpent().after(1.1, 0.3, 4).after(0.7, 0.3, 1)
    tensors = spent.tensors()
    assert {t.dtype for t in tensors.values()} == {torch.float64, torch.int64}
    assert all(name.startswith("privacy/") for name in tensors)
    save_file(tensors, tmp_path / "kept")
    assert PrivacySpent.restored(load_file(tmp_path / "kept")) == spent


def test_nothing_and_no_noise():
    assert PrivacySpent().epsilon(DELTA) == 0.0
    assert PrivacySpent().after(1.0, 0.5, 0) == PrivacySpent()
    assert PrivacySpent.restored({"momentum/x": torch.ones(1)}) == PrivacySpent()
    assert PrivacySpent().after(1.0, 0.1, 3).after(0.0, 0.1, 1).epsilon(DELTA) == math.inf


@pytest.mark.parametrize("lost", ["noise_multiplier", "sample_rate", "steps"])
def test_a_part_of_it_is_refused(lost):
    tensors = PrivacySpent().after(1.0, 0.1, 3).tensors()
    shorter = tensors | {f"privacy/{lost}": torch.zeros(0, dtype=torch.float64)}
    with pytest.raises(ValueError, match="zip"):
        PrivacySpent.restored(shorter)
    del tensors[f"privacy/{lost}"]
    with pytest.raises(ValueError, match="only privacy/"):
        PrivacySpent.restored(tensors)
