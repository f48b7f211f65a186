"""What a deployed run's server is told and no device: its whole configuration, and where it writes.

Flower hands the run config to every device. `deploy run` sends in it what clients need, and puts
the rest into a file of the server, under the run's id.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkn.config import ExperimentConfig, ObserversConfig, ServerConfig, StrategyConfig
from fedkn.errors import FedknError, UserError
from fedkn.files import write_atomically
from fedkn.sections import Scalar

__all__ = ["RUN_FILES", "RunFile", "for_clients", "read_run_file", "told_run", "write_run_file"]

RUN_FILES = "FEDKN_RUN_FILES"
"""Environment variable of a fleet's ServerApps: the folder of these files."""

# The run has its id, and may have begun, before its file can be written.
_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class RunFile:
    """A run of a fleet: its configuration, and what can be done while it goes on."""

    config: ExperimentConfig
    advice: str


def for_clients(config: ExperimentConfig) -> dict[str, Scalar]:
    """Return the dotted keys of `config` for a client: not where and how the server works."""
    return {key: value for key, value in config.flat().items() if key not in _SERVER_ALONE}


def write_run_file(folder: Path, run_id: int, run: RunFile) -> None:
    """Write what the server of run `run_id` is told; only its owner may read it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    content = {"config": run.config.flat(), "advice": run.advice}
    write_atomically(folder / f"{run_id}.json", json.dumps(content).encode(), mode=0o600)


def read_run_file(folder: Path, run_id: int) -> RunFile | None:
    """Return what the server of run `run_id` is told, None where there is no such file.

    Raises:
        UserError: the file is none of ours.
    """
    path = folder / f"{run_id}.json"
    try:
        content = json.loads(path.read_bytes())
        return RunFile(ExperimentConfig.resolve(content["config"]), str(content["advice"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' cannot be read as a run of this fleet: {error}") from None


def told_run(run_id: int, run_config: Mapping[str, Any]) -> RunFile:
    """Return what this process's run is: of a fleet its file, else what Flower's `run_config` says.

    Raises:
        FedknError: the fleet has no file of this run.
    """
    folder = os.environ.get(RUN_FILES)
    if folder is None:
        return RunFile(ExperimentConfig.resolve(run_config), "")
    deadline = time.monotonic() + _WAIT_SECONDS
    while (run := read_run_file(Path(folder), run_id)) is None:
        if time.monotonic() > deadline:
            raise FedknError(f"no {run_id}.json in '{folder}': start runs by fedkn deploy run")
        time.sleep(0.1)
    return run


_SERVER_ALONE = {
    "engine",
    "workers",
    "data.download",
    "evaluation.every",
    "evaluation.target",
    "evaluation.patience",
    # Clients keep what of theirs the server may go back to: `every`, `keep` and max_failed_rounds.
    *(f"checkpoint.{key}" for key in ("folder", "cell", "best")),
    *(f"server.{key}" for key in ServerConfig.model_fields if key != "max_failed_rounds"),
    *(f"observers.{key}" for key in ObserversConfig.model_fields),
    *(f"strategy.{key}" for key in StrategyConfig.model_fields if key != "name"),
}
