"""fedkn from Python: the same runs as by the command line, from a script or without one."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import fedkn
from fedkn.errors import UserError
from server.checkpoints import weights_sha256
from simulations.comparison.scheduler import Board

TINY: dict[str, Any] = {
    "rounds": 2,
    "clients": 3,
    "cohort": 2,
    "train": {"local_steps": 2},
    "model": {"width": 4},
    "settings": {"data.test_limit": 40},
}
CODE = f"import fedkn; r = fedkn.run(name='it', progress=False, **{TINY!r}); print(r.failed)"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> fedkn.Result:
    return fedkn.compare(
        normalizer=["kernel", "none"],
        batch_size=[1, 2],
        seeds=3,
        learning_rate=[0.05, 0.1],
        out=tmp_path_factory.mktemp("runs") / "both",
        progress=False,
        **TINY,
    )


def lines(result: fedkn.Result, kind: str) -> list[dict[str, Any]]:
    text = (result.folder / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def test_the_tables_have_the_numbers_of_the_log(result: fedkn.Result) -> None:
    rounds = result.rounds.set_index(["cell", "round"])
    for line in lines(result, "round"):
        row = rounds.loc[line["cell"], line["round"]]
        for name in ("train_loss", "seconds", "examples", "steps", "bytes_up", "updates"):
            assert row[name] == line[name]
        assert row["clients"] == len(line["cohort"])
    evaluations = lines(result, "evaluation")
    for line in evaluations:
        row = rounds.loc[line["cell"], line["round"]]
        assert (row["metric"], row["value"]) == ("accuracy", line["metrics"]["accuracy"])
        assert row["loss"] == line["loss"]
        assert {name: row[name] for name in line["metrics"]} == line["metrics"]
        assert row["split"] == line["split"]
    assert len(rounds) == len(evaluations)
    cells = result.cells.set_index("cell")
    ends = lines(result, "end")
    assert len(cells) == len(ends)
    for line in ends:
        row = cells.loc[line["cell"]]
        assert (row["status"], row["weights_sha256"]) == (line["status"], line["weights_sha256"])
        assert row["value"] == rounds.loc[line["cell"], 2]["value"]
    for line in lines(result, "start"):
        row = cells.loc[line["cell"]]
        assert row["parameters"] == line["parameters"]
        assert row["learning_rate"] == line["config"]["train.learning_rate"]
        assert (row["seed"], row["purpose"]) == (line["config"]["seed"], line["purpose"])


def test_the_tests_are_those_of_scipy_on_the_cells(result: fedkn.Result) -> None:
    from scipy import stats

    tests, cells = result.tests, result.cells
    assert len(tests) == 2
    final = cells[cells.purpose == "result"].pivot_table(
        index="seed", columns=["batch_size", "normalizer"], values="value"
    )
    for row in tests.itertuples():
        first, second = (final[row.batch_size][name] for name in (row.first, row.second))
        assert row.seeds == 3
        assert row.difference == pytest.approx((first - second).mean(), abs=1e-12)
        assert row.difference >= 0
        expected = stats.ttest_rel(first, second).pvalue
        assert np.isclose(row.p, expected, atol=1e-9) or np.isnan(expected)


def test_the_learning_rates_are_those_that_cells_searched(result: fedkn.Result) -> None:
    rates, cells = result.learning_rates, result.cells
    searched = cells[cells.purpose == "search"]
    assert len(rates) == len(searched)
    for row in rates[rates.chosen].itertuples():
        used = cells[
            (cells.purpose == "result")
            & (cells.normalizer == row.normalizer)
            & (cells.batch_size == row.batch_size)
        ]
        assert set(used.learning_rate) == {row.learning_rate}
        rivals = rates[(rates.normalizer == row.normalizer) & (rates.batch_size == row.batch_size)]
        assert row.value == rivals.value.max()


def test_the_model_has_the_weights_of_the_run(result: fedkn.Result) -> None:
    cell = "kernel-b2-dirichlet0.3-s1"
    network = result.model(cell)
    assert not network.training
    tensors = {name: value.numpy() for name, value in network.state_dict().items()}
    recorded = result.cells.set_index("cell").loc[cell, "weights_sha256"]
    assert weights_sha256(tensors) == recorded
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(UserError, match="choose one"):
        result.model()


def test_a_result_is_shown_with_its_verdict(result: fedkn.Result) -> None:
    assert repr(result) == f"<fedkn.Result '{result.folder}': 12 completed>"
    shown = result._repr_html_()
    assert "kernel" in shown
    assert result.summary()["partitions"][0]["verdict"] in shown
    assert result.report() == result.folder / "report.html"
    assert result.report().is_file()
    assert result.failed == 0


@pytest.mark.parametrize("to", ["csv", "json", "parquet"])
def test_tables_are_exported_and_read_back(
    result: fedkn.Result, to: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from simulations import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(["export-table", str(result.folder), "--to", to, "--out", str(tmp_path)])
    assert not stop.value.code
    names = ["cells", "rounds", "tests", "learning_rates"]
    files = [tmp_path / f"{name}.{to}" for name in names]
    assert capfd.readouterr().out.split() == [str(file) for file in files]
    read = getattr(pd, f"read_{to}")
    if to == "json":
        read = partial(read, precise_float=True)
    for name, file in zip(names, files, strict=True):
        expected, found = getattr(result, name), read(file)
        assert list(found.columns) == list(expected.columns)
        assert len(found) == len(expected)
        for column in expected:
            for one, other in zip(expected[column], found[column], strict=True):
                assert (pd.isna(one) and pd.isna(other)) or one == other


def test_an_export_that_cannot_be_is_one_line(
    result: fedkn.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="did you mean 'csv'"):
        result.export("cvs")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        result.export("csv", tmp_path / "file")
    monkeypatch.setattr("simulations.api.frames.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fedkn\[parquet\]"):
        result.export("parquet")


def test_a_run_that_was_made_elsewhere_is_loaded(result: fedkn.Result) -> None:
    again = fedkn.load(str(result.folder))
    pd.testing.assert_frame_equal(again.rounds, result.rounds)
    before = (result.folder / "metrics.jsonl").read_bytes()
    pd.testing.assert_frame_equal(fedkn.resume(result.folder, progress=False).cells, again.cells)
    assert (result.folder / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="nowhere"):
        fedkn.load("nowhere")


def test_a_run_without_a_cell_has_tables_with_columns(tmp_path: Path) -> None:
    from simulations.runs.folder import RunFolder
    from simulations.runs.records import GridRecord

    record = GridRecord("empty", "fedkn", [], [], [], [], [], {}, {})
    result = fedkn.Result(RunFolder.create(tmp_path / "empty", record))
    for table in (result.cells, result.rounds, result.tests, result.learning_rates):
        assert table.empty
        assert len(table.columns) > 5
    assert result.rounds.value.empty


def test_tables_without_pandas_name_the_extra(
    result: fedkn.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"fedkn\[pandas\]"):
        _ = result.cells
    assert result.summary()["cells"]["ended"] == 12


def test_the_call_is_recorded_and_repeats_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    boards: list[Board] = []
    one = fedkn.run(normalizer="none", name="one", progress=boards.append, **TINY)
    assert boards
    assert boards[-1].ended == boards[-1].total == 1
    assert one.folder == Path("runs/one")
    recorded = json.loads((one.folder / "experiment.json").read_text())["command"]
    two = eval(recorded.replace("name='one'", "name='two', progress=False"), {"fedkn": fedkn})
    assert two.folder == Path("runs/two")
    assert list(two.cells.weights_sha256) == list(one.cells.weights_sha256)
    # By the command line the same, to the bit.
    options = ["--normalizer", "none", "--rounds", "2", "--clients", "3", "--cohort", "2"]
    exact = ("train.local_steps=2", "model.width=4", "data.test_limit=40")
    options += [word for key in exact for word in ("--set", key)]
    command = [sys.executable, "-m", "simulations", "run", *options, "--name", "three"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    three = fedkn.load("runs/three")
    assert list(three.cells.weights_sha256) == list(one.cells.weights_sha256)
    assert three.cells.status.tolist() == ["completed"]


def test_a_run_that_fails_says_so_and_is_a_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wild = {"train": {"local_steps": 2, "clip_norm": 0}, "rounds": 6, "learning_rate": 1e30}
    result = fedkn.run(normalizer="none", out=tmp_path / "wild", progress=False, **(TINY | wild))
    assert result.failed == 1
    assert result.cells.status.tolist() == ["failed"]
    # Not that of its untrained model, which is in the table of rounds.
    assert result.cells[["value", "accuracy", "loss"]].isna().all(axis=None)
    assert result.rounds.value.notna().any()
    said = capfd.readouterr().err
    assert "fedkn resume" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "resnet_8"}, "did you mean 'resnet8'"),
        ({"normalizer": ["kernel", "none"]}, "normalizer.name"),
        ({"partition": ["iid", "shards"]}, "use fedkn compare"),
        ({"settings": {"compare.seeds": 3}}, "use fedkn compare"),
        ({"settings": {"checkpoint.folder": "x"}}, "checkpoint.folder"),
        ({"momentun": 0.9}, "unknown configuration key 'momentun'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as refused:
        fedkn.run(**settings)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["standard input", "an unguarded script", "a thread"])
def test_there_need_be_no_terminal_no_file_and_no_guard(way: str, tmp_path: Path) -> None:
    """What a notebook is: no ``__main__`` that a worker could import, code in other threads."""
    code = f"open('begun.txt', 'a').write('x')\n{CODE}"
    if way == "a thread":
        body = "\n".join(f"    {line}" for line in CODE.split("; "))
        code = (
            "import threading\nopen('begun.txt', 'a').write('x')\n"
            f"def work():\n{body}\nt = threading.Thread(target=work)\nt.start()\nt.join()\n"
        )
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-"] if way == "standard input" else [sys.executable, str(script)]
    done = subprocess.run(
        command, input=code, text=True, cwd=tmp_path, capture_output=True, check=False, timeout=300
    )
    assert done.stdout == "0\n", done.stderr
    assert "\x1b" not in done.stderr
    assert (tmp_path / "begun.txt").read_text() == "x"  # no worker ran it again


def test_what_is_public_is_there() -> None:
    for name in fedkn.__all__:
        assert getattr(fedkn, name) is not None
        assert name in dir(fedkn)
    stub = (Path(fedkn.__file__).with_suffix(".pyi")).read_text()
    listed = eval(stub.split("__all__ = ", 1)[1].split("]", 1)[0] + "]")
    assert listed == fedkn.__all__
    with pytest.raises(AttributeError, match="nothing"):
        _ = fedkn.nothing  # type: ignore[attr-defined]


def test_a_run_grows_by_normalizers_and_batch_sizes_into_the_run_of_all(
    result: fedkn.Result, tmp_path: Path
) -> None:
    small = fedkn.compare(
        normalizer="kernel",
        batch_size=2,
        seeds=3,
        learning_rate=[0.05, 0.1],
        out=tmp_path / "small",
        progress=False,
        command="fedkn compare --name small",
        **TINY,
    )
    before = {line["cell"]: line["weights_sha256"] for line in lines(small, "end")}
    grown = fedkn.resume(
        small.folder, normalizer=["none", "kernel"], batch_size="1", progress=False
    )
    after = {line["cell"]: line["weights_sha256"] for line in lines(grown, "end")}
    assert before.items() < after.items()
    assert after == {line["cell"]: line["weights_sha256"] for line in lines(result, "end")}
    key = ["normalizer", "batch_size", "seed"]
    pd.testing.assert_series_equal(
        grown.cells.set_index(key).accuracy.sort_index(),
        result.cells.set_index(key).accuracy.sort_index(),
    )
    told = grown.summary()
    assert told["complete"]
    assert told["command"] == (
        f"fedkn compare --name small && fedkn resume {small.folder} --normalizer none "
        "--batch-size 1"
    )
    with pytest.raises(UserError, match="did you mean 'kernel'"):
        fedkn.resume(small.folder, normalizer="kernal", progress=False)
