"""``flwr run`` of the checkout, on Flower's own runtime, against the in-process engine."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedkn.config import ExperimentConfig
from simulations.engines.run import run_experiment

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
FLWR = Path(sys.executable).parent / "flwr"
# The number of threads changes the order of float sums; our engine takes one by itself.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SETTINGS = {
    "rounds": 2,
    "cohort": 3,
    "partition.clients": 6,
    "train.local_steps": 5,
    "model.width": 4,
    "data.flip": True,
    "device": "cpu",
}


@pytest.fixture
def environment(tmp_path) -> Iterator[dict[str, str]]:
    """An environment of its own for Flower, all processes of which are gone afterwards."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'fedkn[ray]'")
    if not FLWR.exists():
        pytest.skip(f"there is no {FLWR}")
    home = tmp_path / "flwr"
    home.mkdir()
    ports = _free_ports(2)
    yield {
        **os.environ,
        **THREADS,
        # flwr starts flower-superlink and its kin by name; the environment need not be activated.
        "PATH": f"{FLWR.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    _end_processes_of(home)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


def _end_processes_of(home: Path) -> None:
    """Kill what `flwr run` leaves running: all processes with this FLWR_HOME."""
    mine = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                process.kill()
                mine.append(process)
        except psutil.Error:
            continue
    psutil.wait_procs(mine, timeout=10)


def _option(key: str, value: object) -> str:
    return f"{key}={json.dumps(value)}"


def test_flwr_run_ends_in_the_weights_of_the_inprocess_engine(environment, tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    given = {**SETTINGS, "checkpoint.folder": str(folder)}
    done = subprocess.run(
        [
            str(FLWR),
            "run",
            str(REPOSITORY),
            "--stream",
            "--federation-config",
            "num-supernodes=6 client-resources-num-cpus=1",
            "--run-config",
            " ".join(_option(key, value) for key, value in given.items()),
        ],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    metrics = folder / "metrics.jsonl"
    assert metrics.exists(), f"{done.stdout}\n{done.stderr}"
    end = json.loads(metrics.read_text().splitlines()[-1])
    assert (end["kind"], end["status"]) == ("end", "completed"), done.stdout
    config = ExperimentConfig.resolve(SETTINGS, {"engine": "inprocess", "workers": 1})
    assert end["weights_sha256"] == run_experiment(config).weights_sha256
