import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.simulations.trained_runs import (
    CLASSES,
    EXPORTS,
    HEIGHT,
    WIDTH,
    expected_logits,
    fedkn,
    make_images,
    make_run,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "animals")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", data)


@pytest.fixture(scope="module")
def programs(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if not EXPORTS:
        pytest.skip("PyTorch 2.6 writes few networks as ONNX")
    folder = tmp_path_factory.mktemp("programs")
    for to in ("onnx", "pt2"):
        assert fedkn("export", run, "--to", to, "--output", folder / f"animals.{to}") == 0
    return folder / "animals.onnx", folder / "animals.pt2"


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert fedkn("predict", *arguments, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert tuple(shown["classes"]) == CLASSES
    predictions: list[dict[str, Any]] = shown["predictions"]
    return predictions


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must refuse; return its one line."""
    capsys.readouterr()
    assert fedkn("predict", *arguments) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    return captured.err


def test_run_and_programs_predict_what_the_checkpoint_says(
    run: Path, programs: tuple[Path, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted((data / "test").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]).transpose(0, 3, 1, 2)
    expected = torch.softmax(expected_logits(run, torch.from_numpy(pixels)).double(), 1)
    for model in (run, *programs):
        predictions = predicted(capsys, model, data / "test")
        assert [p["image"] for p in predictions] == [str(path) for path in paths]
        found = torch.tensor([p["probabilities"] for p in predictions], dtype=torch.float64)
        assert torch.allclose(found, expected, atol=1e-4)
        for prediction, row in zip(predictions, found, strict=True):
            assert prediction["class"] == CLASSES[int(row.argmax())]
            assert prediction["probability"] == float(row.max())
            assert prediction["resized_from"] is None
        assert torch.allclose(found.sum(1), torch.ones(len(paths), dtype=torch.float64))


def test_the_table_names_class_and_probability(
    run: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A narrow terminal folds long paths.
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / "[red]owl.png"
    shutil.copy(data / "test" / "owl" / "0.png", path)
    (prediction,) = predicted(capsys, run, path)
    assert fedkn("predict", run, path) == 0
    shown = capsys.readouterr().out
    assert path.name in shown
    assert prediction["class"] in shown
    assert f"{prediction['probability']:.1%}" in shown
    assert "Resized" not in shown


def test_another_size_is_cropped_to_the_models_proportions_and_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Image.new("RGB", (WIDTH, HEIGHT), (200, 60, 30))
    # The middle, of the model's proportions, is plain, and so is what the filter reaches beyond
    # it; what lies further left and right is not.
    wide = Image.new("RGB", (4 * WIDTH, 2 * HEIGHT), (0, 0, 255))
    wide.paste(plain.resize((2 * WIDTH + 6, 2 * HEIGHT)), (WIDTH - 3, 0))
    # Lies on its side, as cameras write it: EXIF says to turn it.
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.save(tmp_path / "a.png")
    wide.save(tmp_path / "b.png")
    turned.save(tmp_path / "c.png", exif=exif)
    one, other, third = predicted(capsys, run, tmp_path)
    assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-6)
    assert third["probabilities"] == one["probabilities"]
    assert other["resized_from"] == [4 * WIDTH, 2 * HEIGHT]
    assert third["resized_from"] is None
    assert fedkn("predict", run, tmp_path) == 0
    shown = capsys.readouterr().out
    assert f"Resized to the model's {WIDTH}x{HEIGHT} pixels: 1 of 3 images" in shown


def test_grey_and_transparent_images_become_what_the_model_takes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH))
    grey.save(tmp_path / "a.png")
    grey.convert("RGB").save(tmp_path / "b.png")
    grey.convert("RGBA").save(tmp_path / "c.png")
    first, *others = predicted(capsys, run, tmp_path)
    for other in others:
        assert other["probabilities"] == first["probabilities"]


def test_folders_are_searched_and_hidden_files_left(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    for name in ("deep/b.PNG", "deep/.c.png", "deep/.hidden/d.png", "a.png"):
        shutil.copy(data / "test" / "cat" / "0.png", tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = [p["image"] for p in predicted(capsys, run, tmp_path, tmp_path / "deep" / ".c.png")]
    assert found == [str(tmp_path / name) for name in ("a.png", "deep/b.PNG", "deep/.c.png")]


def test_bad_images(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused(capsys, run, tmp_path / "no.png")
    assert "no images in folder" in refused(capsys, run, tmp_path)
    assert "Missing argument" in refused(capsys, run)
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "half.png' is damaged, or is none of" in refused(capsys, run, tmp_path / "half.png")
    deep = Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    assert "8 bits" in refused(capsys, run, tmp_path / "deep.png")


def test_one_bad_image_does_not_cost_the_others(
    run: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    # A name that is no UTF-8, and one that a terminal or a table would act on.
    good = [os.fsdecode(b"caf\xe9.png"), "[red]\x1b[2J\n.png"]
    for name in good:
        shutil.copy(data / "test" / "cat" / "0.png", tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "half.png").write_bytes((tmp_path / good[0]).read_bytes()[:200])
    (tmp_path / "photo.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    arguments = ("predict", run, tmp_path, tmp_path / "gone.png")
    assert fedkn(*arguments, "--json") == 1
    shown, said = capsys.readouterr()
    answer = json.loads(shown)
    assert [Path(p["image"]).name for p in answer["predictions"]] == sorted(good)
    bad = {Path(of["image"]).name: of["reason"] for of in answer["failed"]}
    assert set(bad) == {"gone.png", "half.png", "photo.png", "pipe.png"}
    assert bad["pipe.png"] == "is a named pipe"
    assert "4 of 6 images cannot be used." in said
    assert all(name in said for name in bad)
    assert fedkn(*arguments) == 1
    shown, _ = capsys.readouterr()
    assert "caf\\udce9.png" in "".join(shown.split())
    assert "[red]\\x1b[2J.png" in "".join(shown.split())
    assert "\x1b" not in shown


def test_bad_programs(
    programs: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    image = data / "test" / "cat" / "0.png"
    assert "no such file" in refused(capsys, tmp_path / "no.onnx", image)
    assert ".onnx or .pt2" in refused(capsys, image, image)
    assert "experiment.json" in refused(capsys, data, image)
    assert "not one" in refused(capsys, programs[0], image, "--cell", "a")
    for program in programs:
        content = program.read_bytes()
        damaged = tmp_path / program.name
        damaged.write_bytes(content[: len(content) // 2])
        assert "damaged" in refused(capsys, damaged, image)
    foreign = tmp_path / "foreign.pt2"
    torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(2),)), foreign)
    assert "not made by this fedkn" in refused(capsys, foreign, image)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'fedkn[export]'" in refused(capsys, programs[0], image)


def test_outputs_that_are_not_finite_are_refused(
    programs: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Diverged(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :3] * float("nan")

    path = tmp_path / "diverged.pt2"
    extra = {"fedkn.json": ""}
    torch.export.load(programs[1], extra_files=extra)
    example = (torch.zeros(2, 3, HEIGHT, WIDTH),)
    batch = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(Diverged(), example, dynamic_shapes=batch)
    torch.export.save(program, path, extra_files=extra)
    assert "diverged" in refused(capsys, path, data / "test" / "cat" / "0.png")
