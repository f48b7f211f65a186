"""Runs whose data change, are renamed or go: what resume, export, predict and report make of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from server.checkpoints import CheckpointStore
from simulations.programs import program as programs
from simulations.programs.trained_model import load_trained_model
from simulations.report import summary_dict
from simulations.report.holdings import client_tables
from simulations.runs.folder import RunFolder
from tests.forgotten import forget_data
from tests.simulations.trained_runs import (
    CLASSES,
    cell_folder,
    expected_logits,
    fedkn,
    held_out,
    make_images,
    make_run,
)


@pytest.fixture(autouse=True)
def _new_process() -> Iterator[None]:
    forget_data()
    yield
    forget_data()


# -- resume ---------------------------------------------------------------------------------------

_RNG = np.random.default_rng(5)
_IMAGES = _RNG.integers(0, 256, (90, 8, 8), dtype=np.uint8)
_LABELS = np.arange(90) % 3


def write(path: Path, labels: np.ndarray = _LABELS) -> None:
    np.savez(path, images=_IMAGES, labels=labels)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a comparison of two cells; its data are a.npz beside it."""
    folder = tmp_path_factory.mktemp("compared")
    write(folder / "a.npz")
    tiny = ["--rounds", "2", "--clients", "2", "--cohort", "2", "--batch-size", "4", "--seeds", "1"]
    tiny += ["--set", "train.local_steps=2", "--set", "model.width=4", "--learning-rate", "0.1"]
    source = ["--source", "arrays", "--root", folder / "a.npz"]
    out = ["--normalizer", "kernel,group", "--out", folder / "run", "--json"]
    assert fedkn("compare", *tiny, *source, *out, "--set", "compare.workers=1") == 0
    return folder / "run"


@pytest.fixture
def unfinished(compared: Path, tmp_path: Path) -> Path:
    """Return a copy of the comparison in which the cell of one normalizer has not begun."""
    run = Path(shutil.copytree(compared, tmp_path / "run"))
    kept = [
        line for line in (run / "metrics.jsonl").read_text().splitlines() if "group" not in line
    ]
    (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    (of_group,) = (run / "cells").glob("group-*")
    shutil.rmtree(of_group)
    return run


def weights(run: Path) -> dict[str, str | None]:
    return {cell.id: cell.weights_sha256 for cell in RunFolder.open(run).cells()}


def test_between_cells_other_data_are_refused_and_the_same_taken(
    compared: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, log = compared.parent / "a.npz", (unfinished / "metrics.jsonl").read_text()
    try:
        write(data, (_LABELS + 1) % 3)
        forget_data()
        assert fedkn("resume", unfinished) == 2
        said = capsys.readouterr().err
        assert "the data changed since" in said
        assert ": labels." in said
        assert said.count("\n") == 1
        assert (unfinished / "metrics.jsonl").read_text() == log
    finally:
        write(data)
    forget_data()
    assert fedkn("resume", unfinished) == 0
    assert weights(unfinished) == weights(compared)


def test_a_worker_that_finds_other_data_fails_its_cell(
    compared: Path, unfinished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They changed after the run was begun: the process that began it has them in memory."""
    data = compared.parent / "a.npz"
    forget_data()
    load_trained_model(unfinished, None).some_images()
    try:
        write(data, (_LABELS + 1) % 3)
        assert fedkn("resume", unfinished) == 1
    finally:
        write(data)
    assert "the data changed since" in capsys.readouterr().err
    (failed,) = [cell for cell in RunFolder.open(unfinished).cells() if cell.status == "failed"]
    assert failed.id.startswith("group")
    assert "the data changed since" in (failed.error or "")
    assert not failed.rounds


def test_a_run_that_recorded_nothing_is_resumed_and_this_is_said(
    unfinished: Path, compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (unfinished / "data.json").unlink()
    assert fedkn("resume", unfinished) == 0
    for text in (capsys.readouterr().err, (unfinished / "log.txt").read_text()):
        assert "recorded nothing of the data" in " ".join(text.split())
    assert weights(unfinished) == weights(compared)
    assert (unfinished / "data.json").read_text() == (compared / "data.json").read_text()


# -- report ---------------------------------------------------------------------------------------


def test_the_report_names_the_data_without_them(compared: Path) -> None:
    (entry,) = RunFolder.open(compared).data()
    page = (compared / "report.html").read_text()
    assert entry.summary.fingerprint is not None
    training, validation, tests = entry.summary.fingerprint.counts
    assert training + validation + tests == 90
    assert f"{training} to train on, {validation} to validate, {tests} to test; 1×8×8" in page
    assert entry.summary.identity in page
    (shown,) = summary_dict(RunFolder.open(compared))["data"]
    assert shown["fingerprint"] == entry.summary.identity
    assert shown["source"] == "arrays"


def test_what_simulated_clients_say_is_the_partition_that_was_drawn(compared: Path) -> None:
    run = RunFolder.open(compared)
    (drawn,) = run.partitions()
    (table,) = client_tables(run, drawn.partition, run.cells())
    assert table.reported
    assert table.record == drawn
    # A cell that has not begun has said nothing yet.
    (table,) = client_tables(run, drawn.partition, [])
    assert (table.record, table.reported) == (drawn, False)


def test_of_a_fleet_nothing_is_drawn_that_nobody_said(compared: Path, tmp_path: Path) -> None:
    """Folders of earlier versions have a partition that was drawn for devices, too."""
    shutil.copytree(compared, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "experiment.json").read_text())
    record["command"] = "fedkn deploy run fleet"
    (tmp_path / "run" / "experiment.json").write_text(json.dumps(record))
    run = RunFolder.open(tmp_path / "run")
    (drawn,) = run.partitions()
    assert client_tables(run, drawn.partition, []) == []


# -- export and predict ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return an image folder and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("animals")
    images = make_images(folder / "images")
    return images, make_run(folder / "run", images)


@pytest.fixture
def trained(animals: tuple[Path, Path], tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Return the images, which are put back afterwards, and a copy of the run."""
    images, run = animals
    shutil.copytree(images, tmp_path / "kept")
    yield images, Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(images, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", images)


def rename_classes(images: Path) -> None:
    """Call cats dogs, dogs cats, and owls bats."""
    for part in ("train", "test"):
        for old, new in (("cat", "x"), ("dog", "cat"), ("x", "dog"), ("owl", "bat")):
            (images / part / old).rename(images / part / new)
    forget_data()


def some_cats(images: Path, folder: Path) -> Path:
    """Return a folder with a copy of the training images of cats, and of nothing else."""
    return Path(shutil.copytree(images / "train" / "cat", folder / "pictures"))


def test_after_a_rename_export_and_predict_name_what_was_trained(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, run = trained
    pictures = some_cats(images, tmp_path)
    pixels = held_out(run)[0]
    logits = expected_logits(run, pixels)
    assert fedkn("predict", run, pictures, "--json") == 0
    before = capsys.readouterr().out
    rename_classes(images)
    assert fedkn("export", run, "--to", "pt2") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "cat, dog, owl" in said
    assert "the data changed since the run: class names (cat, dog, owl; now bat, cat, dog)" in said
    assert "drawn images" in said
    assert "test images" not in said
    program = programs.load_program(cell_folder(run) / "model.pt2")
    assert program.card.classes == CLASSES
    assert torch.allclose(program.logits(pixels), logits, atol=1e-4)
    assert fedkn("predict", run, pictures, "--json") == 0
    assert capsys.readouterr().out == before


def test_without_the_data_export_and_predict_work(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, run = trained
    pictures = some_cats(images, tmp_path)
    pixels = held_out(run)[0]
    logits = expected_logits(run, pixels)
    shutil.rmtree(images)
    forget_data()
    assert fedkn("export", run, "--to", "pt2", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["test_images"] == 0
    assert shown["drawn_images"] == 256
    assert "are not there" in shown["why_drawn"]
    assert str(images) in shown["why_drawn"]
    assert tuple(shown["classes"]) == CLASSES
    program = programs.load_program(cell_folder(run) / "model.pt2")
    assert torch.allclose(program.logits(pixels), logits, atol=1e-4)
    assert fedkn("predict", run, pictures) == 0
    assert not images.exists()
    assert fedkn("report", run) == 0


def test_drawn_images_are_like_those_of_the_run(trained: tuple[Path, Path]) -> None:
    images, run = trained
    shutil.rmtree(images)
    forget_data()
    model = load_trained_model(run, None)
    drawn = model.some_images()
    assert drawn.images.shape == (256, 3, model.card.height, model.card.width)
    figures = drawn.images.double().div(255).transpose(0, 1).flatten(1)
    # What falls beyond black and white is cut.
    assert figures.mean(1).numpy() == pytest.approx(model.data.mean, abs=0.05)
    assert figures.std(1).numpy() == pytest.approx(model.data.deviation, abs=0.05)
    assert torch.equal(drawn.images, load_trained_model(run, None).some_images().images)


def test_a_repainted_image_is_noticed(trained: tuple[Path, Path]) -> None:
    images, run = trained
    path = images / "test" / "owl" / "0.png"
    with Image.open(path) as picture:
        size = picture.size
    Image.new("RGB", size).save(path)
    forget_data()
    why = load_trained_model(run, None).some_images().why_drawn
    assert why == "the data changed since the run: test images"


def test_a_run_that_recorded_nothing_takes_what_is_there_and_says_so(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, run = trained
    pictures = some_cats(images, tmp_path)
    config = json.loads((cell_folder(run) / "config.json").read_text())
    store = CheckpointStore(cell_folder(run), 1, config)
    newest = store.load_newest()
    assert newest is not None
    store.save(replace(newest, data=None))
    assert not load_trained_model(run, None).recorded
    assert fedkn("predict", run, pictures) == 0
    assert "recorded nothing" in capsys.readouterr().err
    shutil.rmtree(images)
    forget_data()
    assert fedkn("predict", run, pictures) == 2
    assert str(images) in capsys.readouterr().err
