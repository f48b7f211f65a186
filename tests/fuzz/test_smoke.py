"""A second of the campaign, so that make test knows whether `make fuzz` would run."""

from __future__ import annotations

import gc
import json
import random

import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz import loaders
from tests.fuzz.__main__ import main
from tests.fuzz.loaders import LOADERS
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


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_a_loader_accepts_what_is_not_changed(name, monkeypatch):
    for change in ("mutated_bytes", "mutated_json"):
        monkeypatch.setattr(loaders, change, lambda rng, value: value)
    monkeypatch.setattr(loaders, "_change_entry", lambda *given: None)
    assert LOADERS[name](random.Random(1)) == "loaded"


def test_a_campaign_goes_on_where_it_was_interrupted(tmp_path, capsys, monkeypatch):
    results = tmp_path / "slices.jsonl"
    monkeypatch.setattr(fuzz, "_SLICE", 8)
    monkeypatch.setattr(fuzz, "_in_a_process", fuzz.run_slice)
    given = ["--cases", "20", "--target", "device-keys", "--results", str(results)]
    assert main(given) == 0
    whole = capsys.readouterr().out
    lines = results.read_text().splitlines(keepends=True)
    assert [json.loads(line)["cases"] for line in lines] == [8, 8, 4]
    results.write_text("".join(lines[:1]))
    run = []
    monkeypatch.setattr(
        fuzz, "_in_a_process", lambda part: run.append(part) or fuzz.run_slice(part)
    )
    assert main(given) == 0
    assert [part.first for part in run] == [8, 16]
    assert _outcomes(capsys.readouterr().out) == _outcomes(whole)


def test_a_slice_whose_process_ends_has_failed(monkeypatch, capsys):
    monkeypatch.setattr(fuzz.sys, "executable", "false")
    assert main(["--cases", "20", "--target", "device-keys"]) == 1
    assert "20 cases, 20 failures" in capsys.readouterr().out


def _outcomes(printed):
    return [line for line in printed.splitlines() if "loaded" in line or "told" in line]


def test_a_case_is_a_function_of_its_seed(capsys):
    outcomes = [main(["--only", "joining:7", "--seed", "3"]) for _ in range(2)]
    first, second = capsys.readouterr().out.split("\n")[:2]
    assert outcomes == [0, 0]
    assert first == second
