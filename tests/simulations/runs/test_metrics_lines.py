"""Whatever stands in metrics.jsonl, it is read or passed over: nothing in it ends a command."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError
from fedkn.tasks.metric import ACCURACY, Metric
from simulations.report import build_report, summary_dict
from simulations.runs.deployed_run import Progress
from simulations.runs.folder import RunFolder
from simulations.runs.history import History
from simulations.runs.metrics_lines import parsed
from simulations.runs.records import GridRecord
from simulations.runs.results import ClientResult, number, round_of

GRID = GridRecord(
    "digits", "fedkn compare", ["none"], [2], ["dirichlet 0.3, 20 clients"], [0], [0.1], {}, {}
)
CONFIG = ExperimentConfig.resolve({"normalizer.name": "none"}).flat()
LOSS = {"client": 1, "reason": "not online"}
LINES: dict[str, dict[str, Any]] = {
    "start": {
        "purpose": "result",
        "config": CONFIG,
        "parameters": 10,
        "tensors": 3,
        "local_tensors": 0,
        "task": {
            "name": "classification",
            "metric": "accuracy",
            "higher_is_better": True,
            "lowest": 0.0,
            "highest": 1.0,
            "unit": "%",
        },
        "time": 1.0,
    },
    "round": {
        "round": 1,
        "seconds": 1.0,
        "cohort": [0, 1],
        "updates": 1,
        "examples": 20,
        "steps": 10,
        "skipped_batches": 0,
        "skipped_examples": 0,
        "refused": [],
        "failed": [LOSS],
        "train_loss": 1.5,
        "bytes_down": 100,
        "bytes_up": 90,
        "train_seconds": 0.5,
        "learning_rate": 0.1,
        "late": [],
        "state_lost": [0],
        "epsilon": {"0": 1.5},
        "batch_sizes": {"0": 2},
    },
    "evaluation": {
        "round": 1,
        "split": "test",
        "metrics": {"accuracy": 0.5, "macro F1": None},
        "loss": 1.0,
        "examples": 100,
        "by_class": {"accuracy": [0.5, None]},
        "confusion": [[50, 50], [0, 0]],
    },
    "client_evaluation": {
        "round": 1,
        "split": "test",
        "mean": 0.5,
        "worst_tenth": 0.5,
        "deviation": 0.0,
        "loss": 1.0,
        "clients": [{"client": 0, "examples": 4, "value": 0.5, "loss": 1.0}],
        "failed": [LOSS],
    },
    "memory": {"peak_bytes": 4096, "batch_size": 2},
    "resume": {"round": 1, "time": 1.0},
    "end": {"status": "completed", "seconds": 2.0, "weights_sha256": "ab", "error": ""},
}

numbers = st.one_of(
    st.integers(), st.sampled_from([2**63, 10**400, -1]), st.floats(), st.booleans(), st.none()
)
texts = st.one_of(st.text(max_size=20), st.sampled_from(["\ud800", "\x1b[2J", "../../x", "\x00"]))
values = st.recursive(
    st.one_of(numbers, texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def line(of: str, **changes: Any) -> dict[str, Any]:
    return {"cell": "none-b2-dirichlet0.3-s0", "kind": of, **LINES[of], **changes}


def old_evaluation(accuracy: float | None) -> dict[str, Any]:
    """As fedkn 0.1 wrote it."""
    told = {"round": 1, "split": "test", "accuracy": accuracy, "loss": 1.0, "examples": 100}
    return {"cell": "none-b2-dirichlet0.3-s0", "kind": "evaluation", **told}


def read_everywhere(folder: RunFolder, texts: list[str]) -> None:
    """Write a sound run with `texts` among its lines; read it as report, resume and fleet do."""
    sound = [line("start"), line("round"), line("evaluation")]
    whole = "\n".join([*map(json.dumps, sound), *texts]) + "\n"
    folder.metrics_path.write_text(whole, encoding="utf-8")
    history = History(folder.metrics_path)
    history.poll()
    progress = Progress()
    for read in folder.tail().poll():
        progress.take(read)
    with suppress(FedknError):
        summary_dict(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder.create(tmp_path_factory.mktemp("runs") / "run", GRID)


@given(data=st.data())
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_json_in_any_field_is_read_or_passed_over(folder: RunFolder, data: Any) -> None:
    kind = data.draw(st.sampled_from(sorted(LINES)))
    changed = line(kind)
    names = st.lists(st.sampled_from(sorted(changed)), min_size=1, max_size=2, unique=True)
    for name in data.draw(names):
        inside = changed[name]
        if isinstance(inside, list) and inside and data.draw(st.booleans()):
            changed[name] = [data.draw(values), *inside]
        elif isinstance(inside, list) and inside and isinstance(inside[0], dict):
            key = data.draw(st.sampled_from(sorted(inside[0])))
            changed[name] = [inside[0] | {key: data.draw(values)}]
        elif isinstance(inside, dict) and inside:
            key = data.draw(st.sampled_from(sorted(inside)))
            changed[name] = inside | {key: data.draw(values)}
        else:
            changed[name] = data.draw(values)
    read_everywhere(folder, [json.dumps(changed)])


@given(st.lists(st.one_of(st.text(max_size=40), values.map(json.dumps)), max_size=4))
@settings(max_examples=50, deadline=None)
def test_any_text_is_read_or_passed_over(texts: list[str]) -> None:
    for text in texts:
        assert parsed(text.encode("utf-8", "surrogatepass")) is None or text.lstrip()[:1] == "{"


BAD = {
    "no object": "[1, 2]",
    "nested": "[" * 100_000,
    "nested inside": json.dumps(line("end"))[:-1] + ', "error": ' + "[" * 50_000,
    "an integer of 5000 digits": json.dumps(line("memory")).replace("4096", "9" * 5000),
    "kind is a list": json.dumps(line("round", kind=[])),
    "cell is a list": json.dumps(line("round", cell=[])),
    "cell is a way out of the folder": json.dumps(line("round", cell="../../x")),
    "cell is empty": json.dumps(line("round", cell="")),
    "cohort is null": json.dumps(line("round", cohort=None)),
    "cohort of truths": json.dumps(line("round", cohort=[True])),
    "accuracy is text": json.dumps(line("evaluation", metrics={"accuracy": "0.5"})),
    "accuracy above 1": json.dumps(line("evaluation", metrics={"accuracy": 1.5})),
    "an older line's accuracy above 1": json.dumps(old_evaluation(1.5)),
    "no accuracy": json.dumps(line("evaluation", metrics={"rmse": 0.5})),
    "a metric of no name": json.dumps(line("evaluation", metrics={"accuracy": 0.5, "": 1})),
    "metrics without bound": json.dumps(
        line("evaluation", metrics={"accuracy": 0.5, **{str(i): i for i in range(1000)}})
    ),
    "a confusion that is no square": json.dumps(line("evaluation", confusion=[[1, 2], [3]])),
    "fewer than no pixel": json.dumps(line("evaluation", confusion=[[-1]])),
    "a task without a metric": json.dumps(line("start", task={"name": "classification"})),
    "a task whose best is below its worst": json.dumps(
        line("start", task=LINES["start"]["task"] | {"lowest": 2.0})
    ),
    "a task that speaks to the terminal": json.dumps(
        line("start", task=LINES["start"]["task"] | {"unit": "\x1b[2J"})
    ),
    "a client beyond the range": json.dumps(
        line("client_evaluation", clients=[{"client": 0, "examples": 4, "value": 7, "loss": 1}])
    ),
    "a mean beyond the range": json.dumps(line("client_evaluation", mean=-0.1)),
    "refused holds a number": json.dumps(line("round", refused=[1])),
    "a reason is a list": json.dumps(line("round", failed=[{"client": 1, "reason": []}])),
    "config is text": json.dumps(line("start", config="x")),
    "config is nested": json.dumps(line("start", config={"seed": {"x": 1}})),
    "seconds of less than nothing": json.dumps(line("round", seconds=-1.0)),
    "a status of its own": json.dumps(line("end", status="done")),
    "more correct than there are": json.dumps(
        line("client_evaluation", clients=[{"client": 0, "examples": 0, "correct": 0, "loss": 1}])
    ),
    "more correct than there were, older": json.dumps(
        line("client_evaluation", clients=[{"client": 0, "examples": 4, "correct": 5, "loss": 1}])
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_passed_over_counted_and_said(tmp_path: Path, name: str) -> None:
    folder = RunFolder.create(tmp_path / "run", GRID)
    read_everywhere(folder, [BAD[name]])
    history = History(folder.metrics_path)
    history.poll()
    assert history.skipped == 1
    (cell,) = folder.cells()
    assert [r.round for r in cell.rounds] == [1]
    assert cell.values("test") == {1: 0.5}
    page = build_report(folder).read_text(encoding="utf-8")
    assert "unreadable lines" in page


def test_lines_from_before_there_were_tasks_are_read(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", GRID)
    begun = {key: value for key, value in line("start").items() if key != "task"}
    clients = [{"client": 0, "examples": 8, "correct": 6, "loss": 0.5}]
    lines = [begun, old_evaluation(0.5), line("client_evaluation", clients=clients), line("end")]
    folder.metrics_path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    (cell,) = folder.cells()
    assert cell.metric == ACCURACY
    assert cell.values("test") == {1: 0.5}
    assert cell.evaluations[0].metrics == {"accuracy": 0.5}
    assert cell.client_evaluation is not None
    assert cell.client_evaluation.clients == (ClientResult(0, 8, 0.75, 0.5),)
    history = History(folder.metrics_path)
    history.poll()
    assert history.skipped == 0
    assert history[cell.id].evaluations == {1: (0.5, 1.0)}


def test_the_deciding_metric_is_that_of_the_cells_task(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", GRID)
    task = {
        "name": "regression",
        "metric": "rmse",
        "higher_is_better": False,
        "lowest": 0.0,
        "highest": None,
        "unit": "m",
    }
    metrics = {"rmse": 7.5, "mae": 6.0, "r2": -3.0}
    clients = [{"client": 0, "examples": 8, "value": 9.0, "loss": 0.5}]
    own = {"mean": 9.0, "worst_tenth": 9.0, "clients": clients}
    lines = [
        line("start", task=task),
        line("evaluation", metrics=metrics),
        line("client_evaluation", **own),
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n"
    folder.metrics_path.write_text(text)
    (cell,) = folder.cells()
    assert cell.metric == Metric("rmse", False, 0.0, math.inf, "m")
    assert cell.values("test") == {1: 7.5}
    assert cell.evaluations[0].metrics == metrics
    assert cell.client_evaluation is not None
    assert cell.client_evaluation.mean == 9.0
    history = History(folder.metrics_path)
    progress = Progress()
    history.poll()
    for read in folder.tail().poll():
        progress.take(read)
    assert history[cell.id].metric == progress.metric == cell.metric
    assert (history[cell.id].evaluations, progress.value) == ({1: (7.5, 1.0)}, 7.5)
    # What this metric cannot be is passed over, and what another could not is nobody's concern.
    impossible = {"metrics": metrics | {"rmse": -1.0}}
    folder.metrics_path.write_text(text + json.dumps(line("evaluation", **impossible)) + "\n")
    tail = folder.tail()
    assert [read["kind"] for read in tail.poll()] == ["start", "evaluation", "client_evaluation"]
    assert tail.skipped == 1


def test_a_loss_of_nobody_known_beside_one_of_a_client(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", GRID)
    refused = [{"client": client, "reason": "NaN"} for client in (None, 3, 1, None)]
    folder.metrics_path.write_text(
        "\n".join(map(json.dumps, (line("start"), line("round", refused=refused)))) + "\n"
    )
    page = build_report(folder).read_text(encoding="utf-8")
    assert "clients 1, 3 and unknown" in page


def test_numbers_with_which_nobody_can_compute_are_none() -> None:
    for value in (None, math.nan, math.inf, -math.inf, 1e300, 10**400):
        assert math.isnan(number(value))
    assert number(3.4e38) == 3.4e38
    read = parsed(json.dumps(line("round", train_loss=1e300)).encode())
    assert read is not None
    assert math.isnan(round_of(read).train_loss)


def test_what_devices_say_is_printable_and_short() -> None:
    read = parsed(
        json.dumps(
            line("round", refused=[{"client": 1, "reason": "\x1b[2Jone\nround 9/9" + "x" * 10**6}])
        ).encode()
    )
    assert read is not None
    (loss,) = round_of(read).refused
    assert loss.reason.startswith("\\x1b[2Jone round 9/9")
    assert len(loss.reason) <= 1000
