"""The SuperExec of a device: a task becomes a process that has torch loaded from its birth."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from flwr.proto.runtime_pb2 import (
    AcquireTaskResponse,
    PushTaskOutputResponse,
    SendTaskHeartbeatResponse,
)
from flwr.proto.task_pb2 import Task

from clients.device import superexec, supernode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ClientApps are forked on Linux")


class RuntimeApi(BaseHTTPRequestHandler):
    """A SuperNode with a single task, whose ClientApp never gets its input."""

    tasks: list[AcquireTaskResponse]
    asked: threading.Event
    release: threading.Event

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match self.path.rpartition("/")[2]:
            case "acquire-task":
                answer = self.tasks.pop() if self.tasks else AcquireTaskResponse()
                self._answer(200, answer.SerializeToString())
            case "send-task-heartbeat":
                # An empty answer says that the task is no longer wanted, and its app ends at once.
                self._answer(200, SendTaskHeartbeatResponse(success=True).SerializeToString())
            case "pull-task-input":
                self.asked.set()
                self.release.wait(30)
                self._answer(400, b"")
            case "push-task-output":
                self._answer(200, PushTaskOutputResponse().SerializeToString())
            case _:
                self._answer(404, b"")

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def runtime_api() -> Iterator[tuple[type[RuntimeApi], int]]:
    class Api(RuntimeApi):
        asked, release = threading.Event(), threading.Event()

    Api.tasks = [AcquireTaskResponse(task=Task(task_id=7, type="flwr-clientapp"), token="t")]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Api, server.server_address[1]
    finally:
        Api.release.set()
        server.shutdown()
        server.server_close()


def wait_for(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_task_is_forked_with_torch_loaded_and_all_ends_with_the_supernode(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    environment = {**os.environ, "FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0"}
    environment |= {"FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
    with runtime_api() as (api, port):
        command = supernode.superexec_command(port, parent.pid)
        started = psutil.Popen(command, env=environment, cwd=tmp_path)
        try:
            assert api.asked.wait(150)
            all_ = started.children(recursive=True)
            (app,) = [child for child in all_ if child.name() == "flwr-clientapp"]
            # The bundle has not even come: what is loaded was there before.
            assert any(Path(one.path).name.startswith("libtorch") for one in app.memory_maps())
            # What another thread held at a fork would be held for ever in the child.
            forker = psutil.Process(app.ppid())
            assert forker.num_threads() == 1
            parent.kill()
            parent.wait()
            wait_for(lambda: started.poll() is not None)
            wait_for(lambda: not [child for child in all_ if child.is_running()])
        finally:
            for process in (parent, started):
                if process.poll() is None:
                    process.kill()
                    process.wait()


def test_a_superexec_asks_nobody_before_its_own_user_listens(monkeypatch):
    """A port that another user holds is as good as none."""
    over = subprocess.Popen([sys.executable, "-c", ""])
    over.wait()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        superexec._wait_for(over.pid, port)
        monkeypatch.setattr(os, "getuid", lambda: 2**31)
        with pytest.raises(SystemExit):
            superexec._wait_for(over.pid, port)
        monkeypatch.undo()
        with pytest.raises(SystemExit):
            superexec._wait_for(over.pid, port + 1)


BUNDLE = """
import sys
import clients.device.superexec, fedkn.config
clients.device.superexec.forget_own_packages()
sys.path.insert(0, sys.argv[1])
import clients.app, fedkn
print(clients.app.__file__, fedkn.__file__)
"""


def test_the_bundles_code_runs_not_what_is_installed(tmp_path):
    for name in ("clients/__init__.py", "clients/app.py", "fedkn/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    done = subprocess.run(
        [sys.executable, "-c", BUNDLE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        str(tmp_path / "clients" / "app.py"),
        str(tmp_path / "fedkn" / "__init__.py"),
    ]
