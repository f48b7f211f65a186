"""DP-SGD in whole runs: the privacy spent is kept by the client and grows from round to round."""

from __future__ import annotations

import pytest

from fedkn.errors import UserError
from simulations.engines.run import run_experiment
from tests.simulations.engines.test_local_tensors import Killed, config, kill_after, lines

PRIVATE = {
    "privacy__mechanism": "example",
    "privacy__noise_multiplier": 2.0,
    "evaluation__client_fraction": 0.0,
    "cohort": 6,
    "rounds": 4,
}


def test_what_is_spent_grows_and_survives_a_kill(tmp_path, monkeypatch):
    whole = run_experiment(config(tmp_path / "whole", **PRIVATE))
    rounds = [line["epsilon"] for line in lines(tmp_path / "whole", "round")]
    assert all(spent.keys() == set("012345") for spent in rounds)
    for client in "012345":
        epsilons = [spent[client] for spent in rounds]
        assert epsilons == sorted(set(epsilons))
        # Composition: far less than a fresh account in every round would add up to.
        assert epsilons[-1] < 4 * epsilons[0]
    interrupted = config(tmp_path / "killed", **PRIVATE)
    kill_after(monkeypatch, 3)
    with pytest.raises(Killed):
        run_experiment(interrupted)
    monkeypatch.undo()
    assert run_experiment(interrupted).weights_sha256 == whole.weights_sha256
    assert lines(tmp_path / "killed", "round")[-1]["epsilon"] == rounds[-1]


@pytest.mark.parametrize("normalizer", ["batch", "brn", "hbn"])
def test_normalizers_that_mix_examples_are_refused_before_anything_is_sent(normalizer):
    with pytest.raises(UserError, match="exampl"):
        run_experiment(
            config(**{**PRIVATE, "evaluation__client_fraction": 0.3}, normalizer__name=normalizer)
        )


def test_no_noise_is_no_privacy():
    with pytest.raises(UserError, match=r"noise_multiplier"):
        run_experiment(config(**{**PRIVATE, "privacy__noise_multiplier": 0.0}))
