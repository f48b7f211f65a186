"""Every command on a terminal that has no "±", with names that would do harm to what shows them."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from simulations import cli
from simulations.terminal import plain_where_needed, shown_steps, terminal
from tests.simulations.report.synthetic import Synthetic

# Mathematics and its end, a page's script, a table's markup, a terminal's commands, a sheet's.
CLASSES = (
    "$\\frac{",
    "<script>alert('a/b')</script>",
    "[/red] [bold] :smile:",
    "two\nlines\x1b[2J",
    "=1+1",
    "±→ü日",
)
TINY = ["--rounds", "2", "--clients", "2", "--cohort", "2", "--set", "partition.minimum=4"]
TINY += ["--set", "train.local_steps=2", "--set", "model.width=4", "--model", "convnet3"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=["ascii", "latin-1"])
def fedkn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line on a terminal of this encoding: exit code, output, errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            for name in ("stdout", "stderr"):
                stream = io.TextIOWrapper(io.BytesIO(), request.param, write_through=True)
                patch.setattr(sys, name, stream)
            streams = (sys.stdout, sys.stderr)
            with pytest.raises(SystemExit) as stop:
                cli.main([str(argument) for argument in arguments])
            said = [s.buffer.getvalue().decode(request.param) for s in streams]  # type: ignore[attr-defined]  # a BytesIO
        return int(stop.value.code or 0), said[0], said[1]

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (120, 10, 10), dtype=np.uint8)
    path = tmp_path_factory.mktemp("data") / "odd.npz"
    np.savez(path, images=images, labels=np.arange(120) % 5, classes=np.array(CLASSES))
    return path


@pytest.mark.parametrize("fedkn", ["ascii"], indirect=True)
def test_a_run_and_what_is_done_with_it(
    fedkn: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    out = Path("a [x] run")
    code, shown, said = fedkn("run", *TINY, "--source", "arrays", "--root", data, "--out", out)
    assert code == 0, said
    assert "a [x] run/report.html" in shown
    code, shown, said = fedkn("resume", out)
    assert code == 0, said
    assert "a [x] run/report.html" in shown
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "$\\frac{" in page
    assert "\x1b" not in page
    # The class without an image is in the table of what was left out.
    assert "no training example of 1 of 6 classes: ±→ü日" in page

    picture = Path(os.fsdecode(b"caf\xe9 [bold].png"))
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(picture)
    code, shown, said = fedkn("predict", out, picture, "gone é.png")
    assert code == 1
    assert "caf\\udce9 [bold].png" in shown
    assert "gone \\xe9.png" in said
    assert "No such file" in said


def test_results_of_several_seeds_are_shown(fedkn: Run, tmp_path: Path) -> None:
    run = Synthetic(tmp_path / "run", normalizers=["kernel", "[/red]$x"], batch_sizes=[1], seeds=3)
    run.write_extras()
    run.write_cells()
    code, shown, said = fedkn("report", tmp_path / "run")
    assert code == 0, said
    assert "mean and 95% interval" in " ".join(shown.split())
    assert " +- " in shown or " ± " in shown
    assert "[/red]$x" in shown


def test_partitions_and_findings_are_shown(
    fedkn: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    picture = tmp_path / "p.png"
    source = ("--source", "arrays", "--root", data)
    code, shown, said = fedkn("partition", *source, "--clients", "2", "--picture", picture)
    assert code == 0, said
    assert "[/red] [bold] :smile:" in shown
    assert "two lines\\x1b[2J" in shown
    assert Image.open(picture).width
    code, shown, said = fedkn("doctor")
    assert code in {0, 1}
    assert "python" in shown
    code, _, said = fedkn("report", "gone ±\x1b[2J")
    assert code == 2
    assert "\x1b" not in said
    assert said.count("\n") == 1


def test_a_device_is_checked(fedkn: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text(
        'name = "gerät"\nserver = "127.0.0.1:1"\npartition_id = 0\npartitions = 2\n'
        f'[data]\nsource = "arrays"\nroot = "{data}"\n[experiment.model]\nwidth = 4\n',
        encoding="utf-8",
    )
    code, shown, said = fedkn("device", "check", tmp_path)
    assert code == 1, said  # there is no server
    assert "-> " in shown
    assert "[/red] [bold] :smile:" in shown
    assert "two lines\\x1b[2J" in shown


def test_streams_of_a_process_in_a_plain_environment(tmp_path: Path) -> None:
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = (
        "from simulations.terminal import plain_where_needed, terminal\n"
        "plain_where_needed()\n"
        "print('94.9% ± 1.6 → ‘ü’ 日 \\udce9')\n"
        "terminal().print('[bold] – :smile:')\n"
    )
    file = tmp_path / "program.py"
    file.write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, file],
        env=os.environ | environment,
        capture_output=True,
        check=True,
    )
    expected = "94.9% +- 1.6 -> '\\xfc' \\u65e5 \\udce9\n[bold] - :smile:\n"
    assert done.stdout.decode("ascii") == expected


def test_streams_that_take_any_text_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    plain_where_needed()
    terminal().print("± [x]")
    assert sys.stdout.getvalue() == "± [x]\n"  # type: ignore[attr-defined]  # a StringIO


@pytest.mark.parametrize("is_terminal", [False, True])
def test_steps_are_lines_or_shown_while_they_last(is_terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=60, markup=False)
    with shown_steps(console) as step:
        step("one [bold]")
        step("two")
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert is_terminal or shown.count("\n") == 2
    assert "two" in shown
    assert is_terminal or "   0 s  one [bold]\n" in shown


def test_json_is_ascii(fedkn: Run, data: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.svg"
    code, shown, said = fedkn(
        "partition",
        "--source",
        "arrays",
        "--root",
        data,
        "--clients",
        "2",
        "--picture",
        picture,
        "--json",
    )
    assert code == 0, said
    assert json.loads(shown)["partitions"][0]["classes"] == list(CLASSES)
