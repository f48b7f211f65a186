"""What ``pip install fedkn[device]`` leaves out is not needed to check a device and to train."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[3]

BLOCKED = """
import sys

class Blocked:
    names = "ray matplotlib scipy sklearn torchvision jinja2 opacus onnx onnxruntime".split()
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} on this device", name=name)

sys.meta_path.insert(0, Blocked())
"""

TRAIN = """
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from clients.app import app
from fedkn.config import ExperimentConfig
from fedkn.experiment import build_model, normalizer_of
from fedkn.data.summary import DataSummary
from fedkn.federation import data_record, on_the_wire, tensors_to_arrays

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
config = ExperimentConfig.resolve({
    "partition.clients": 2, "cohort": 2, "model.width": 4, "train.local_steps": 3, "device": "cpu",
    "data.source": "arrays", "data.root": "/only/on/the/server.npz",
})
node = {"partition-id": 1, "num-partitions": 2, "device-name": "a", "data-path": sys.argv[1]}
context = Context(run_id=1, node_id=9, node_config=node, state=RecordDict(),
                  run_config=config.flat())
images = DataSummary(tuple("0123456789"), (1, 8, 8), (0.3,), (0.4,))
model = build_model(config, images)
names = on_the_wire(normalizer_of(config).federation_rule(model))
state = {name: model.state_dict()[name] for name in names}
told = ConfigRecord({"server-round": 1, "learning-rate": 0.1, "run-token": "0123456789abcdef",
                     "state-round": 0})
content = RecordDict({"arrays": tensors_to_arrays(state), "config": told,
                      "data": data_record(images)})
reply = app(Message(content, dst_node_id=9, message_type=MessageType.TRAIN), context)
metrics = reply.content.metric_records["metrics"]
assert (metrics["num-examples"], metrics["steps"]) == (200, 3), metrics
loaded = sorted(name for name in Blocked.names if name in sys.modules)
assert not loaded, loaded
import clients.app
print("trained by", clients.app.__file__)
"""


def python(code: str, *arguments: object, folder: Path = ROOT) -> str:
    """Run `code` in a process of its own, which imports fedkn from `folder` alone."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + f"sys.path.insert(0, {str(folder)!r})\n" + code]
        + [str(argument) for argument in arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_apps_and_command_line_without_the_packages_of_a_workstation(digits_file):
    out = python(
        "import server.app, simulations.cli\n"
        "try: simulations.cli.main(['device', 'check', '--help'])\n"
        "except SystemExit as left: assert left.code in (0, None), left.code\n" + TRAIN,
        digits_file,
    )
    assert "Check versions, memory, clock" in out
    assert f"trained by {ROOT}" in out


def test_what_flower_bundles_trains_without_them(digits_file, tmp_path):
    built = subprocess.run(
        [Path(sys.executable).with_name("flwr"), "build", "--app", str(ROOT)],
        cwd=tmp_path,
        env={
            **os.environ,
            "FLWR_HOME": str(tmp_path / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    (bundle,) = tmp_path.rglob("*.fab")
    assert built.returncode == 0, built.stderr
    unpacked = tmp_path / "app"
    zipfile.ZipFile(bundle).extractall(unpacked)
    assert f"trained by {unpacked}" in python(TRAIN, digits_file, folder=unpacked)
