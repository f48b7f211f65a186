"""A second of the campaign, so that make test knows whether `make fuzz` would run."""

from __future__ import annotations

import gc
import logging
import random

import pytest

from tests.fuzz.__main__ import main
from tests.fuzz.targets import TARGETS

_CASES = {"whole-runs": 1}


@pytest.fixture(autouse=True)
def _quick_collections():
    # Flower collects garbage after every aggregation: not all that the tests ever imported.
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_few_cases_of_every_target(name):
    for case in range(_CASES.get(name, 25)):
        assert TARGETS[name].run(random.Random(f"smoke-{name}-{case}"))


def test_a_case_is_a_function_of_its_seed(capsys):
    logging.disable(logging.NOTSET)
    try:
        outcomes = [main(["--only", "joining:7", "--seed", "3"]) for _ in range(2)]
    finally:
        logging.disable(logging.NOTSET)
    first, second = capsys.readouterr().out.split("\n")[:2]
    assert outcomes == [0, 0]
    assert first == second
