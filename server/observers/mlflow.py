"""MLflow: a file store that ``mlflow ui --backend-store-uri RUN/mlflow`` shows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fedkn.observer import Event
from server.observers.tracker import Tracker

__all__ = ["MLflow"]

_CELL = "fedkn.cell"
_STATUS = {"completed": "FINISHED", "failed": "FAILED"}


class MLflow(Tracker):
    """An MLflow run for each cell, its settings as parameters; a resumed cell goes on in its run.

    Args:
        folder: see `Tracker`.
        experiment: MLflow's name for what belongs together; by default the run folder's.
    """

    name = "mlflow"
    _client: MlflowClient | None = None

    def __init__(self, folder: str = "", experiment: str = "") -> None:
        super().__init__(folder)
        self._experiment = experiment

    def open(self, folder: Path, event: Event) -> None:
        """Make the run, or find it again."""
        # Not by MLflow's own global state: that is the user's.
        # A folder of files needs no server; recent versions of MLflow want to be asked for it.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(tracking_uri=folder.as_uri())
        name = self._experiment or (event.folder.name if event.folder else "fedkn")
        # Another cell's process may make it at the same moment.
        with suppress(MlflowException):
            self._client.create_experiment(name)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            raise OSError(f"MLflow has no experiment '{name}' in {folder}")
        found = self._client.search_runs(
            [experiment.experiment_id], f"tags.`{_CELL}` = '{event.cell}'"
        )
        if found:
            self._id = found[0].info.run_id
            return
        tags = {_CELL: event.cell}
        made = self._client.create_run(experiment.experiment_id, tags=tags, run_name=event.cell)
        self._id = made.info.run_id
        settings = [Param(key, str(value)) for key, value in event.config.flat().items()]
        self._client.log_batch(self._id, params=settings)

    def record(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log metrics."""
        assert self._client is not None
        now = int(1000 * datetime.now().timestamp())
        metrics = [Metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, status: str) -> None:
        """Say how the run ended."""
        if self._client is not None:
            self._client.set_terminated(self._id, _STATUS.get(status, "KILLED"))
