import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fedkn import __version__
from fedkn.data.sources import load
from simulations import cli
from simulations.runs.folder import RunFolder
from tests.full_disk import fill, small_file_system

# Two rounds of a few steps: what is tested is the way through, not the accuracy.
TINY = [
    *("--rounds", "2", "--clients", "3", "--cohort", "2"),
    *("--set", "train.local_steps=2", "--set", "model.width=4", "--set", "data.test_limit=40"),
]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def fedkn(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return int(stop.value.code or 0)


def written(folder: Path = Path()) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def image_folder(path: Path, classes: int) -> str:
    for split in ("train", "test"):
        for label in range(classes):
            (path / split / str(label)).mkdir(parents=True)
            for number in range(4):
                picture = Image.new("L", (8, 8), 20 * number)
                picture.save(path / split / str(label) / f"{number}.png")
    return str(path)


BAD_INPUT = {
    "normalizer": (["--normalizer", "kernal"], "did you mean 'kernel'"),
    "model": (["--model", "resnet_8"], "did you mean 'resnet8'"),
    "source": (["--source", "digit"], "did you mean 'digits'"),
    "strategy": (["--set", "strategy.name=fedavgn"], "did you mean 'fedavg"),
    "key": (["--set", "train.momentun=0.9"], "did you mean 'train.momentum'"),
    "setting without value": (["--set", "train.momentum"], "KEY=VALUE"),
    "batch size 0": (["--batch-size", "0"], "compare.batch_sizes"),
    "batch size 1 for batch alone": (["--normalizer", "batch", "--batch-size", "1"], "at least 2"),
    "negative learning rate": (["--learning-rate", "-0.1"], "greater than 0"),
    "NaN learning rate": (["--learning-rate", "nan"], "learning_rates"),
    "rounds 0": (["--rounds", "0"], "rounds"),
    "seeds 0": (["--seeds", "0"], "compare.seeds"),
    "cohort too large": (["--cohort", "21"], "cohort (21)"),
    "too many shards": (["--partition", "shards:shards_per_client=500"], "shards_per_client"),
    "too many clients": (["--clients", "1000"], "partition.clients"),
    "partition": (["--partition", "dirichlt:alpha=1"], "dirichlet"),
    "group count": (["--normalizer", "group", "--set", "normalizer.groups=3"], "divide 64"),
    "no root": (["--source", "mnist"], "--root"),
    "root without the data": (["--source", "mnist", "--root", "."], "mnist"),
    "no such device": (["--set", "device=cuda:99"], "cuda:99"),
    "no such file": (["nothing.toml"], "nothing.toml"),
    "axis of its own": (["--axis", "seed=1,2"], "--seeds"),
    "axis that is no key": (["--axis", "strategy.nmae=fedavg"], "did you mean 'strategy.name'"),
    "axis value": (["--axis", "train.momentum=0,fast"], "axis 'train.momentum'"),
    "axis name": (["--axis", "strategy.name=fedavg,scafold"], "with strategy.name scafold"),
    "axis without values": (["--axis", "strategy.name"], "KEY=VALUE"),
    "axis twice": (["--axis", "rounds=1", "--axis", "rounds=2"], "given twice"),
    "no such option": (["--normaliser", "kernel"], "--normaliser"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD_INPUT[name]
    assert fedkn("compare", *arguments) == 2
    check_one_line(capfd, message)
    assert written() == []


@pytest.mark.parametrize("command", ["compare", "run", "partition"])
@pytest.mark.parametrize(
    ("kind", "message"), [("one class", "class"), ("corrupt npz", "npz"), ("no folder", "no")]
)
def test_unusable_data_are_one_line(
    command: str, kind: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, root = "image_folder", str(tmp_path / "missing")
    if kind == "one class":
        root = image_folder(tmp_path / "images", 1)
    elif kind == "corrupt npz":
        source, root = "arrays", str(tmp_path / "data.npz")
        Path(root).write_bytes(b"PK\x03\x04 not an archive")
    assert fedkn(command, "--source", source, "--root", root) == 2
    check_one_line(capfd, message)
    assert written() == []


def test_what_is_not_a_run_folder_is_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cwd" / "holiday"
    folder.mkdir()
    (folder / "picture.txt").write_text("a beach")
    for command in ("resume", "report"):
        assert fedkn(command, "holiday") == 2
        check_one_line(capfd, "not a run folder")
        assert fedkn(command, "nowhere") == 2
        check_one_line(capfd, "nowhere")
    assert fedkn("compare", "--out", "holiday") == 2
    check_one_line(capfd, "exists already")
    assert written() == ["holiday", "holiday/picture.txt"]


def test_malformed_toml_names_the_line(capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.toml").write_text("rounds = 3\n[train\n")
    assert fedkn("compare", "bad.toml") == 2
    check_one_line(capfd, "line 2")
    Path("grid.toml").write_text("[compare]\nseeds = 2\n")
    assert fedkn("run", "grid.toml") == 2
    check_one_line(capfd, "fedkn compare grid.toml")


def test_debug_shows_where(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="did you mean 'kernel'"):
        cli.main(["compare", "--normalizer", "kernal", "--debug"])


def test_an_axis_and_two_runs_in_one_report_from_end_to_end(
    capfd: pytest.CaptureFixture[str],
) -> None:
    few = ["--normalizer", "none", "--batch-size", "8", "--learning-rate", "0.1", "--seeds", "3"]
    axis = ["--axis", "strategy.name=fedavg,scaffold"]
    assert fedkn("compare", *TINY, *few, *axis, "--name", "varied") == 0
    out, err = capfd.readouterr()
    assert "6 result cells: about 48 local steps of clients." in err
    assert "Estimate: " in err
    assert "Between values of strategy.name: " in out
    run = RunFolder.open("runs/varied")
    steps = sum(round_.steps for cell in run.cells() for round_ in cell.rounds)
    assert steps == 48
    assert {cell.config.strategy.name for cell in run.cells()} == {"fedavg", "scaffold"}
    # What is complete is not run again, under whatever name its cells have.
    assert fedkn("resume", "runs/varied", "--json") == 0
    (told,) = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert told["cells"]["completed"] == 6
    assert fedkn("compare", *TINY, *few, "--set", "train.momentum=0.9", "--name", "momentum") == 0
    capfd.readouterr()
    assert fedkn("report", "runs/varied", "runs/momentum", "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert told["beside"]["common"] == 3
    assert list(told["beside"]["settings"]) == ["train.momentum"]
    (between,) = told["beside"]["differences"]
    assert (between["seeds"], between["axes"]) == (3, {"strategy.name": "fedavg"})
    assert told["report"] == "runs/report-varied-momentum.html"
    assert Path(told["report"]).is_file()


def test_compare_report_and_resume_from_end_to_end(capfd: pytest.CaptureFixture[str]) -> None:
    Path("grid.toml").write_text("[compare]\nnormalizers = ['kernel', 'batch']\nseeds = 4\n")
    overrides = ["--seeds", "2", "--batch-size", "1,8", "--learning-rate", "0.1", "--json"]
    assert fedkn("compare", "grid.toml", *TINY, *overrides, "--name", "tiny") == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["cells"]["completed"] == 6
    assert summary["cells"]["untrainable"] == 2  # BatchNorm at batch 1
    assert Path(summary["report"]).is_file()
    accuracies = {
        (entry["normalizer"], entry["batch_size"]): entry["accuracy_by_seed"]
        for entry in summary["partitions"][0]["entries"]
    }
    assert len(accuracies) == 4
    assert set(accuracies["kernel", 1]) == {"0", "1"}

    run = RunFolder.open("runs/tiny")
    assert run.grid.command == f"fedkn compare grid.toml {' '.join(TINY + overrides)} --name tiny"
    assert run.grid.seeds == [0, 1]
    assert len(run.partitions()) == 2
    assert run.environment()["packages"]["torch"]
    assert all(cell.config.train.learning_rate == 0.1 for cell in run.cells())

    before = run.metrics_path.read_bytes()
    assert fedkn("resume", "runs/tiny", "--json") == 0
    assert json.loads(capfd.readouterr().out)["partitions"] == summary["partitions"]
    assert run.metrics_path.read_bytes() == before

    Path(summary["report"]).unlink()
    assert fedkn("report", "runs/tiny") == 0
    assert "kernel" in capfd.readouterr().out
    assert Path(summary["report"]).is_file()


def test_a_fleets_run_is_resumed_by_its_fleet(capfd: pytest.CaptureFixture[str]) -> None:
    assert fedkn("run", *TINY, "--name", "one") == 0
    record = Path("runs/one/experiment.json")
    began = json.loads(record.read_text()) | {"command": "fedkn deploy run my-fleet --name one"}
    record.write_text(json.dumps(began))
    before = written()
    assert fedkn("resume", "runs/one") != 0
    assert "fedkn deploy run . --resume one" in capfd.readouterr().err
    assert written() == before


def test_a_report_that_cannot_be_written_is_shown_all_the_same(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fedkn("run", *TINY, "--name", "one") == 0

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("simulations.report.page.write_atomically", full)
    capfd.readouterr()
    assert fedkn("report", "runs/one") != 0
    shown = capfd.readouterr()
    assert "kernel" in shown.out
    assert "cannot write the report 'runs/one/report.html': No space left" in shown.err
    assert fedkn("report", "runs/one", "--json") != 0
    (summary,) = json.loads(capfd.readouterr().out)["runs"]
    assert summary["report"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--normalizer", "kernel,batch"), "use fedkn compare"),
        (("--partition", "iid,dirichlet:alpha=1"), "use fedkn compare"),
        (("--set", "compare.seeds=3"), "use fedkn compare"),
        (("--set", "checkpoint.folder=x"), "--out"),
        (("--set", "evaluation.split=validation"), "results are on test images"),
    ],
)
def test_run_ignores_nothing_that_it_was_told(
    arguments: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fedkn("run", *TINY, *arguments) != 0
    assert said in " ".join(capfd.readouterr().err.split())
    assert not written()


def test_a_full_disk_says_how_to_go_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "runs/one/metrics.jsonl")

    monkeypatch.setattr("simulations.api.running.run_grid", full)
    assert fedkn("run", *TINY, "--name", "one") != 0
    said = " ".join(capfd.readouterr().err.split())
    assert "No space left on device (runs/one/metrics.jsonl)" in said
    assert "fedkn resume runs/one" in said


def test_a_disk_too_small_for_the_beginning_keeps_nothing_from_beginning_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "small"
    place.mkdir()
    out = ("--out", str(place / "run"))
    with small_file_system(place, "64k"):
        filler = fill(place)
        assert fedkn("run", *TINY, *out) == 2
        check_one_line(capfd, "No space left on device")
        assert written(place) == [str(filler)]
        with filler.open("r+b") as file:
            file.truncate(44 * 1024)
        assert fedkn("run", *TINY, *out) != 0  # for the model, there is no room
        said = " ".join(capfd.readouterr().err.split())
        assert "No space left on device" in said
        if (place / "run").exists():
            assert f"fedkn resume {place / 'run'}" in said
    assert fedkn("run", *TINY, *out) == 0


def test_run_prints_every_round_and_repeats_to_the_bit(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--normalizer", "none", "--batch-size", "4", "--learning-rate", "0.05", *TINY]
    hashes: list[Any] = []
    for name in ("one", "two"):
        assert fedkn("run", *options, "--name", name) == 0
        (cell,) = RunFolder.open(f"runs/{name}").cells()
        hashes.append(cell.weights_sha256)
        assert cell.config.train.batch_size == 4
        shown = capfd.readouterr()
        assert "round 2/2" in shown.err
        assert "Report:" in shown.out
    assert hashes[0]
    assert hashes[0] == hashes[1]


def test_a_run_may_train_on_every_image(capfd: pytest.CaptureFixture[str]) -> None:
    Path("all.toml").write_text("[data]\nvalidation_fraction = 0\n")
    assert fedkn("run", "all.toml", *TINY, "--name", "all") == 0
    (cell,) = RunFolder.open("runs/all").cells()
    assert cell.status == "completed"
    assert cell.values("test")
    counted = json.loads(Path("runs/all/partition.json").read_text())["partitions"][0]["counts"]
    assert sum(map(sum, counted)) == len(load("digits").train)
    assert fedkn("partition", "--set", "data.validation_fraction=0", "--json") == 0
    capfd.readouterr()
    assert fedkn("compare", "all.toml", *TINY, "--name", "searched") == 2
    check_one_line(capfd, "give a single compare.learning_rates")
    assert fedkn("compare", "all.toml", *TINY, "--learning-rate", "0.1", "--seeds", "1") == 0
    capfd.readouterr()
    Path("chosen.toml").write_text("[evaluation]\nsplit = 'validation'\n")
    for command in ("run", "compare"):
        assert fedkn(command, "chosen.toml", *TINY, "--name", "chosen") == 2
        check_one_line(capfd, "evaluation.split = validation")


@pytest.mark.parametrize("module", ["simulations", "simulations.cli"])
def test_the_modules_are_the_command_line(module: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    assert run("--version").stdout == f"fedkn {__version__}\n"
    assert "Usage: fedkn" in run().stdout
    refused = run("run", "nothing.toml")
    assert refused.returncode == 2
    assert refused.stderr.startswith("fedkn: cannot read 'nothing.toml'")


def test_failing_run_ends_in_1(capfd: pytest.CaptureFixture[str]) -> None:
    # Steps so large that no update is finite: the server refuses every one.
    options = ["--learning-rate", "1e30", "--set", "train.clip_norm=0", "--rounds", "6"]
    code = fedkn("run", *TINY, *options, "--normalizer", "none", "--name", "wild", "--json")
    shown = capfd.readouterr()
    assert code == 1
    assert json.loads(shown.out)["cells"]["failed"] == 1
    assert "fedkn resume runs/wild" in shown.err


def test_partition_counts_every_image_and_draws_a_picture(
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = ["shards:shards_per_client=2", "--clients", "7", "--picture", "p.svg"]
    assert fedkn("partition", *options, "--json") == 0
    shown = json.loads(capfd.readouterr().out)
    (table,) = shown["partitions"]
    assert len(table["counts"]) == 7
    assert fedkn("partition", *options) == 0
    assert str(sum(map(sum, table["counts"]))) in capfd.readouterr().out
    assert written() == ["p.svg"]


def test_help_of_every_command_teaches_with_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "compare", "run", "resume", "report", "partition"):
        assert fedkn(command, "--help") == 0
        assert f"fedkn {command}" in capfd.readouterr().out.split("Example", 1)[1]


def check_one_line(capfd: pytest.CaptureFixture[str], message: str) -> None:
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("fedkn: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err
