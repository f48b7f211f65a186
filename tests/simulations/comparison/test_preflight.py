"""What is known to be wrong with a grid is said before anything is written."""

import pytest

from fedkn.errors import UserError
from simulations.comparison.grid import GridConfig
from simulations.comparison.preflight import check


def grid(normalizers: str, **settings: object) -> GridConfig:
    small = {"model.width": 4, "partition.clients": 4, "cohort": 2, "compare.learning_rates": 0.1}
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    return GridConfig.resolve(
        {"compare.normalizers": normalizers, "compare.batch_sizes": 2}, small, changed
    )


@pytest.mark.parametrize(
    ("normalizers", "settings", "message"),
    [
        ("kernel,fedbn", {}, "fedbn keeps tensors on the clients: set evaluation.client_fraction"),
        ("silobn,kernel,fedbn", {}, "silobn, fedbn keep tensors on the clients"),
        ("batch", {"normalizer__bn_statistics": "local"}, "batch keeps tensors on the clients"),
    ],
)
def test_tensors_that_stay_on_the_clients_ask_for_an_evaluation_there(
    normalizers: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        check(grid(normalizers, **settings))
    assert str(caught.value).startswith(message)
    assert check(grid(normalizers, evaluation__client_fraction=0.2, **settings))


def test_tensors_that_all_travel_ask_for_none() -> None:
    assert check(grid("kernel,batch"))


def test_what_cannot_be_trained_privately_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"'batch' normalizes every example by the others"):
        check(grid("kernel,batch", privacy__mechanism="example"))
    assert check(grid("kernel,group", privacy__mechanism="example"))
