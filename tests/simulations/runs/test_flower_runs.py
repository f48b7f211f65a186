from __future__ import annotations

from pathlib import Path

import pytest

from fedkn.config import ExperimentConfig
from fedkn.errors import UserError
from server.metrics_log import MetricsLog
from simulations.report import build_report
from simulations.runs.flower_runs import open_run


def test_a_folder_that_the_serverapp_alone_wrote_gets_a_report(tmp_path: Path) -> None:
    config = ExperimentConfig.resolve(
        {"normalizer.name": "group", "train.batch_size": 4, "seed": 3}
    )
    log = MetricsLog(tmp_path, "experiment")
    log.write("start", time=0.0, purpose="result", config=config.flat(), parameters=10, tensors=2)
    for round_, accuracy in ((0, 0.1), (config.rounds, 0.7)):
        log.write(
            "evaluation", round=round_, split="test", accuracy=accuracy, loss=1.0, examples=10
        )
    log.write("end", status="completed", seconds=1.0, weights_sha256="00")
    run = open_run(tmp_path)
    assert (run.grid.normalizers, run.grid.batch_sizes, run.grid.seeds) == (["group"], [4], [3])
    assert run.grid.command == (
        "flwr run . --run-config 'seed=3 normalizer.name=\"group\" train.batch_size=4'"
    )
    assert "70.0%" in build_report(run).read_text(encoding="utf-8")
    assert open_run(tmp_path).grid == run.grid


@pytest.mark.parametrize("content", [None, ""])
def test_other_folders_are_refused_and_left_as_they_are(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="not a run folder"):
        open_run(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
