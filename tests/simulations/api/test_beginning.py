"""Where a run begins: what its cells are held to."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from fedkn import models, normalizers
from fedkn.errors import UserError
from fedkn.network import build_network
from simulations.api.beginning import begun, created
from simulations.comparison.grid import GridConfig, groups, result_cells

GROUP = normalizers.create("group")


def weights(path: Path, seed: int) -> str:
    """Write initial weights of the model of `grid`; return their SHA-256."""
    model = models.build(
        "resnet8", num_classes=10, in_channels=1, normalizer=GROUP, width=4, seed=seed
    )
    torch.save(model.state_dict(), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_of_weights_that_are_an_axis_are_each_held_to_their_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hashes = {name: weights(tmp_path / name, seed) for seed, name in enumerate(("a.pt", "b.pt"))}
    grid = GridConfig.resolve(
        {
            "data.source": "digits",
            "model.name": "resnet8",
            "model.width": 4,
            "model.final_norm": "none",
            "compare.normalizers": ["group"],
            "compare.batch_sizes": [2],
            "compare.learning_rates": [0.01],
            "compare.seeds": 1,
            "compare.axes.model.weights": ["a.pt", "", "b.pt"],
        }
    )
    created(grid, "compare", tmp_path / "run", "fedkn compare")
    # As it was written, and as a resume reads it.
    again, _ = begun(tmp_path / "run")
    cells = [cell for group in groups(again) for cell in result_cells(again, group, 0.01)]
    found = {Path(cell.config.model.weights).name: cell.config.model for cell in cells}
    assert {name: found[name].weights_sha256 for name in found} == {**hashes, "": ""}
    assert all(Path(found[name].weights).is_absolute() for name in hashes)
    weights(tmp_path / "b.pt", 7)
    by_name = {Path(cell.config.model.weights).name: cell.config for cell in cells}
    build_network(by_name["a.pt"].model, GROUP, outputs=10, shape=(1, 8, 8), seed=0)
    with pytest.raises(UserError, match="not the file of weights that the run was begun with"):
        build_network(by_name["b.pt"].model, GROUP, outputs=10, shape=(1, 8, 8), seed=0)


def test_a_file_of_weights_of_an_axis_that_is_not_there_is_said_before_anything_is_written(
    tmp_path,
):
    grid = GridConfig.resolve({"compare.axes.model.weights": [str(tmp_path / "none.pt")]})
    with pytest.raises(UserError, match=r"cannot read model\.weights"):
        created(grid, "compare", tmp_path / "run", "fedkn compare")
    assert not (tmp_path / "run").exists()
