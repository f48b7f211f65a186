import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fedkn.normalizers import TensorRole
from fedkn.normalizers.kernel import KernelNormalizer
from fedkn.training import Inputs
from simulations.programs import program as programs
from simulations.programs.classifier import FromPixels
from simulations.programs.trained_model import load_trained_model
from simulations.runs.folder import RunFolder
from tests.simulations.trained_runs import (
    CLASSES,
    EXPORTS,
    HEIGHT,
    WIDTH,
    cell_folder,
    expected_logits,
    fedkn,
    held_out,
    make_images,
    make_run,
)

CELL = "kernel-b2-dirichlet0.3-s0"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "animals")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "trained", data)


needs_newer = pytest.mark.skipif(not EXPORTS, reason="PyTorch 2.6 writes few networks as ONNX")


@pytest.fixture(scope="module", params=[pytest.param("onnx", marks=needs_newer), "pt2"])
def program(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    path = tmp_path_factory.mktemp("programs") / f"animals.{request.param}"
    assert fedkn("export", trained, "--to", request.param, "--output", path) == 0
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def run_onnx(path: Path, pixels: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": pixels.numpy().astype(np.float32)})
    return torch.from_numpy(logits)


def agree(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-4 * max(1.0, float(ours.abs().max())))


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=needs_newer), "pt2"])
def test_steps_are_told_as_they_begin(
    to: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"animals.{to}"
    assert fedkn("export", run, "--to", to, "--output", path) == 0
    said = capsys.readouterr()
    assert "Program: " in said.out
    steps = [line.split(" s  ")[1] for line in said.err.splitlines()]
    assert "recording what the model computes" in steps
    assert ("simplifying the program" in steps) == (to == "onnx")
    assert steps[-1] == "reading the program again and running it on images"
    assert fedkn("export", run, "--to", to, "--output", path, "--json") == 0
    assert capsys.readouterr().err == ""


@needs_newer
def test_an_onnx_program_takes_pixels_as_they_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "animals.onnx"
    assert fedkn("export", run, "--output", path, "--json") == 0
    images, labels = held_out(run)
    logits = run_onnx(path, images)
    assert agree(logits, expected_logits(run, images))
    assert agree(run_onnx(path, images[:1]), logits[:1])
    # What the server measured of these weights, by way of its own.
    (record,) = RunFolder.open(run).cells()
    accuracy = float((logits.argmax(1) == labels).double().mean())
    assert accuracy == pytest.approx(record.values("test")[2])
    shown = json.loads(capsys.readouterr().out)
    assert shown["program"] == str(path)
    assert shown["bytes"] == path.stat().st_size
    assert 0 <= shown["difference"] <= 1e-4
    assert shown["same_class"] == shown["test_images"] == len(images)
    assert (shown["cell"], shown["round"]) == (CELL, 2)
    assert shown["weights_sha256"] == record.weights_sha256
    metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    card = json.loads(metadata["fedkn"])
    assert tuple(card["classes"]) == CLASSES
    assert (card["channels"], card["height"], card["width"]) == (3, HEIGHT, WIDTH)
    assert card["scaling"] == "standardized"
    assert len(card["mean"]) == len(card["deviation"]) == 3


WITHOUT_FEDKN = """
import sys, numpy
images = numpy.load("images.npy")
if sys.argv[1].endswith(".onnx"):
    import onnxruntime
    (logits,) = onnxruntime.InferenceSession(sys.argv[1]).run(None, {"images": images})
else:
    import torch
    logits = torch.export.load(sys.argv[1]).module()(torch.from_numpy(images)).detach().numpy()
numpy.save("logits.npy", logits)
assert not [name for name in sys.modules if name.startswith(("fedkn", "simulations"))]
"""


@pytest.mark.skipif(not EXPORTS, reason="PyTorch 2.6 does not know its own autocast again")
def test_a_program_runs_where_fedkn_is_not(trained: Path, program: Path, tmp_path: Path) -> None:
    images, _ = held_out(trained)
    np.save(tmp_path / "images.npy", images.float().numpy())
    command = [sys.executable, "-P", "-c", WITHOUT_FEDKN, str(program)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    logits = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert agree(logits, expected_logits(trained, images))


def test_running_statistics_are_those_of_the_checkpoint(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "batch", data, "--normalizer", "batch")
    images, _ = held_out(run)
    logits = load_trained_model(run, None).classifier.logits(images)
    assert agree(logits, expected_logits(run, images))


def test_neither_a_path_nor_an_image_of_this_machine_is_in_the_file(
    trained: Path, data: Path, program: Path
) -> None:
    content = program.read_bytes()
    assert b"owl" in content
    for path in (ROOT, data, trained, Path(sys.prefix)):
        assert str(path).encode() not in content
    images, _ = held_out(trained)
    for image in images:
        assert image.float().numpy().tobytes() not in content


@pytest.mark.parametrize("scaling", ["unit", "centered", "standardized"])
def test_the_scaling_in_the_program_is_that_of_training(scaling: str) -> None:
    mean, deviation = torch.tensor([0.3, 0.5]), torch.tensor([0.2, 0.7])
    given = (mean, deviation) if scaling == "standardized" else (None, None)
    inputs = Inputs(scaling, *given)
    pixels = torch.arange(256, dtype=torch.uint8).expand(2, 1, 256).reshape(1, 2, 16, 16)
    program = FromPixels.of(nn.Identity(), inputs, channels=2)
    assert torch.equal(program(pixels.float()), inputs(pixels))


def test_a_damaged_checkpoint_is_passed_over_and_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = cell_folder(run) / "checkpoint-000002.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert fedkn("export", run, "--to", "pt2") == 0
    shown = capsys.readouterr().out
    assert "round 1 of 2" in shown
    assert newest.name in shown
    images, _ = held_out(run)
    logits = programs.load_program(cell_folder(run) / "model.pt2").logits(images)
    assert agree(logits, expected_logits(run, images, round_=1))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must refuse; return its one line."""
    assert fedkn(*arguments) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    return captured.err


def test_without_a_good_checkpoint_nothing_is_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in cell_folder(run).glob("checkpoint-*"):
        path.write_bytes(path.read_bytes()[:-10])
    assert "checkpoint-000001.safetensors" in refused(capsys, "export", run)
    for path in cell_folder(run).glob("checkpoint-*"):
        path.unlink()
    assert "no checkpoint" in refused(capsys, "export", run)
    assert [path.name for path in cell_folder(run).iterdir()] == ["config.json"]


def test_a_cell_must_be_chosen_where_several_are_finished(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + log.read_text().replace(CELL, "other"))
    line = refused(capsys, "export", run)
    assert "--cell" in line
    assert CELL in line
    assert "other" in line
    assert "did you mean" in refused(capsys, "export", run, "--cell", CELL[:-1])
    assert "no checkpoint" in refused(capsys, "export", run, "--cell", "other")
    assert load_trained_model(run, CELL).card.cell == CELL


def test_an_unfinished_cell_is_exported_only_on_request(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "metrics.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")
    line = refused(capsys, "export", run)
    assert "fedkn resume" in line
    assert CELL in line
    assert load_trained_model(run, CELL).card.round == 2


def test_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refused(capsys, "export", tmp_path / "nowhere")
    assert "experiment.json" in refused(capsys, "export", cell_folder(run))
    assert "'tflite'" in refused(capsys, "export", run, "--to", "tflite")
    assert "must end in .onnx" in refused(capsys, "export", run, "--output", tmp_path / "a.pt2")
    missing = tmp_path / "no" / "a.onnx"
    assert "does not exist" in refused(capsys, "export", run, "--output", missing)
    assert not missing.parent.exists()
    (tmp_path / "folder.onnx").mkdir()
    assert "a folder" in refused(capsys, "export", run, "--output", tmp_path / "folder.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(capsys, "export", run)
    assert package in line
    assert "pip install 'fedkn[export]'" in line
    assert not (cell_folder(run) / "model.onnx").exists()


def test_a_program_whose_outputs_differ_is_not_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = programs.load_program

    def off(path: Path) -> Any:
        classifier = real(path)
        return type(classifier)(classifier.card, lambda pixels: classifier.run(pixels) + 0.5)

    monkeypatch.setattr(programs, "load_program", off)
    assert fedkn("export", run, "--to", "pt2") == 1
    assert "differ" in capsys.readouterr().err
    assert not (cell_folder(run) / "model.pt2").exists()
    assert not list(cell_folder(run).glob(".export-*"))


def test_weights_of_another_model_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "metrics.jsonl"
    log.write_text(log.read_text().replace('"model.width": 4', '"model.width": 8'))
    assert "does not fit its model" in refused(capsys, "export", run)


def test_a_model_that_lives_on_the_clients_in_part_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(KernelNormalizer, "role_of", lambda *_: TensorRole.LOCAL)
    assert "tensors of its own" in refused(capsys, "export", run)
