"""Rates are judged by what the clients get, on validation images, and never by lost clients."""

import math

import pytest

from fedkn.tasks.metric import ACCURACY, Metric
from simulations.runs.rate_scores import SearchedCell, rate_scores
from simulations.runs.results import ClientEvaluation, ClientResult, Loss


def own(*correct: int | None, split: str = "validation", loss: float = 0.5) -> ClientEvaluation:
    """Clients with ten images each; None for one that could not be evaluated."""
    results = [ClientResult(i, 10, c / 10, loss) for i, c in enumerate(correct) if c is not None]
    failed = [Loss(i, "impossible figures") for i, c in enumerate(correct) if c is None]
    mean = sum(r.value for r in results) / len(results) if results else math.nan
    return ClientEvaluation(3, split, mean, 0.0, 0.0, loss, tuple(results), tuple(failed))


def cell(
    evaluation: ClientEvaluation | None,
    *,
    keeps: bool = True,
    seed: int = 0,
    completed: bool = True,
) -> SearchedCell:
    return SearchedCell(seed, completed, [(0.2, 2.0), (0.4, 1.0)], keeps, evaluation)


def test_own_models_count_where_tensors_stay_and_the_global_one_elsewhere() -> None:
    assert rate_scores({0.1: [cell(own(9, 5))]}, ACCURACY) == {0.1: pytest.approx((0.7, 0.5))}
    assert rate_scores({0.1: [cell(own(9, 5), keeps=False)]}, ACCURACY) == {
        0.1: pytest.approx((0.3, 1.5))
    }
    assert rate_scores({0.1: [cell(None, keeps=False)]}, ACCURACY) == {
        0.1: pytest.approx((0.3, 1.5))
    }


def test_test_images_choose_nothing() -> None:
    accuracy, loss = rate_scores({0.1: [cell(own(9, 9, split="test"))]}, ACCURACY)[0.1]
    assert math.isnan(accuracy)
    assert math.isnan(loss)


def test_a_rate_gains_nothing_by_losing_its_worst_client() -> None:
    scores = rate_scores({0.1: [cell(own(8, 4))], 1.0: [cell(own(9, None))]}, ACCURACY)
    assert scores[0.1][0] == pytest.approx(0.6)
    assert scores[1.0][0] == pytest.approx(0.45)


def test_a_client_that_can_never_be_evaluated_costs_no_rate_anything() -> None:
    scores = rate_scores({0.1: [cell(own(8, None))], 1.0: [cell(own(9, None))]}, ACCURACY)
    assert [accuracy for accuracy, _ in scores.values()] == pytest.approx([0.8, 0.9])


def test_seeds_are_averaged_and_have_clients_of_their_own() -> None:
    cells = [cell(own(8, 6)), cell(own(4, None), seed=1)]
    assert rate_scores({0.1: cells}, ACCURACY)[0.1][0] == pytest.approx((0.7 + 0.4) / 2)


@pytest.mark.parametrize("lost", [cell(own(9), completed=False), cell(None), cell(own(None, None))])
def test_a_cell_without_figures_rules_its_rate_out(lost: SearchedCell) -> None:
    scores = rate_scores({0.1: [cell(own(9)), lost], 0.3: [cell(own(1))]}, ACCURACY)
    assert math.isnan(scores[0.1][0])
    assert scores[0.3][0] == pytest.approx(0.1)


RMSE = Metric("rmse", higher_is_better=False, lowest=0.0)


def test_where_lower_is_better_and_nothing_the_worst_a_lost_client_counts_as_the_worst_seen() -> (
    None
):
    def errors(*values: float | None) -> ClientEvaluation:
        results = [ClientResult(i, 10, v, 0.5) for i, v in enumerate(values) if v is not None]
        return ClientEvaluation(3, "validation", 0.0, 0.0, 0.0, 0.5, tuple(results), ())

    trials = {0.1: [cell(errors(3.0, 2.0))], 1.0: [cell(errors(1.0, None))]}
    scores = rate_scores(trials, RMSE)
    assert scores[0.1][0] == pytest.approx(2.5)
    assert scores[1.0][0] == pytest.approx((1.0 + 3.0) / 2)
    undefined = rate_scores(
        {0.1: [cell(errors(3.0, math.nan))], 1.0: [cell(errors(1.0, 2.0))]}, RMSE
    )
    assert undefined[0.1][0] == pytest.approx((3.0 + 3.0) / 2)
