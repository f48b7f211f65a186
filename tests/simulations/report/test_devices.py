"""The report says on which device each cell ran, where the lines of the run tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations.report.facts import Fact, facts
from simulations.report.summary import summarize
from simulations.report.tables import summary_dict
from simulations.runs.folder import RunFolder
from tests.simulations.report.synthetic import Synthetic

CARD = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    made = Synthetic(tmp_path / "run", normalizers=("kernel", "none"), batch_sizes=(2,), seeds=2)
    made.write_cells()
    return made.folder


def tell(run: RunFolder, devices: list[str], resumed: str = "") -> list[str]:
    """Let the cells have begun on `devices`, in turn, the first gone on on `resumed`."""
    path = run.path / "metrics.jsonl"
    lines, cells = [], []
    for line in map(json.loads, path.read_text().splitlines()):
        if line["kind"] == "start":
            line["device"] = devices[len(cells) % len(devices)]
            cells.append(line["cell"])
        lines.append(line)
        if resumed and line["kind"] == "start" and len(cells) == 1:
            lines.append({"cell": cells[0], "kind": "resume", "round": 0, "device": resumed})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return cells


def told(run: RunFolder) -> list[Fact]:
    (summary,) = summarize([run])
    return [fact for fact in facts(summary) if fact.name == "computed on"]


def test_every_cells_gpus_are_told_those_after_a_resume_too(run: RunFolder) -> None:
    cells = tell(run, [f"{CARD}, GPU 0", f"{CARD}, GPU MIG-1f"], resumed=f"{CARD}, GPU 3")
    assert told(run) == [Fact("computed on", CARD, "GPU 0, 3, MIG-1f")]
    entries = summary_dict(run)["partitions"][0]["entries"]
    devices = {cell: names for entry in entries for cell, names in entry["devices"].items()}
    assert devices[cells[0]] == [f"{CARD}, GPU 0", f"{CARD}, GPU 3"]
    assert devices[cells[1]] == [f"{CARD}, GPU MIG-1f"]
    assert len(devices) == 4


def test_a_cpu_is_told_as_such_and_runs_of_before_tell_nothing(run: RunFolder) -> None:
    assert told(run) == []
    assert summary_dict(run)["partitions"][0]["entries"][0]["devices"] == {}
    tell(run, ["cpu"])
    assert told(run) == [Fact("computed on", "cpu")]
