"""Rates are judged by what the clients get, on validation images, and never by lost clients."""

import math

import pytest

from simulations.runs.rate_scores import SearchedCell, rate_scores
from simulations.runs.results import ClientEvaluation, ClientResult, Loss


def own(*correct: int | None, split: str = "validation", loss: float = 0.5) -> ClientEvaluation:
    """Clients with ten images each; None for one that could not be evaluated."""
    results = [ClientResult(i, 10, c, loss) for i, c in enumerate(correct) if c is not None]
    failed = [Loss(i, "impossible figures") for i, c in enumerate(correct) if c is None]
    mean = sum(r.accuracy for r in results) / len(results) if results else math.nan
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
    assert rate_scores({0.1: [cell(own(9, 5))]}) == {0.1: pytest.approx((0.7, 0.5))}
    assert rate_scores({0.1: [cell(own(9, 5), keeps=False)]}) == {0.1: pytest.approx((0.3, 1.5))}
    assert rate_scores({0.1: [cell(None, keeps=False)]}) == {0.1: pytest.approx((0.3, 1.5))}


def test_test_images_choose_nothing() -> None:
    accuracy, loss = rate_scores({0.1: [cell(own(9, 9, split="test"))]})[0.1]
    assert math.isnan(accuracy)
    assert math.isnan(loss)


def test_a_rate_gains_nothing_by_losing_its_worst_client() -> None:
    scores = rate_scores({0.1: [cell(own(8, 4))], 1.0: [cell(own(9, None))]})
    assert scores[0.1][0] == pytest.approx(0.6)
    assert scores[1.0][0] == pytest.approx(0.45)


def test_a_client_that_can_never_be_evaluated_costs_no_rate_anything() -> None:
    scores = rate_scores({0.1: [cell(own(8, None))], 1.0: [cell(own(9, None))]})
    assert [accuracy for accuracy, _ in scores.values()] == pytest.approx([0.8, 0.9])


def test_seeds_are_averaged_and_have_clients_of_their_own() -> None:
    cells = [cell(own(8, 6)), cell(own(4, None), seed=1)]
    assert rate_scores({0.1: cells})[0.1][0] == pytest.approx((0.7 + 0.4) / 2)


@pytest.mark.parametrize("lost", [cell(own(9), completed=False), cell(None), cell(own(None, None))])
def test_a_cell_without_figures_rules_its_rate_out(lost: SearchedCell) -> None:
    scores = rate_scores({0.1: [cell(own(9)), lost], 0.3: [cell(own(1))]})
    assert math.isnan(scores[0.1][0])
    assert scores[0.3][0] == pytest.approx(0.1)
