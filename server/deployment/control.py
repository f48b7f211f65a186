"""The SuperLink's Control API: devices and runs. The only file here that speaks it.

It knows no passwords: whoever reaches its port may use it, so the SuperLink listens on 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.run_pb2 import Run
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedkn.config import ExperimentConfig
from fedkn.errors import FedknError, UserError
from fedkn.sections import Scalar
from server.deployment.certificates import public_pem
from server.deployment.fleet import Device, Fleet
from server.rounds.heartbeats import heartbeat_age
from server.run_file import RunFile, for_clients, read_run_file, write_run_file

__all__ = ["Control", "DeviceState", "RunState", "SuperLinkAway", "advice"]

AnswerT = TypeVar("AnswerT")


class SuperLinkAway(FedknError):
    """The SuperLink does not answer."""


@dataclass(frozen=True)
class DeviceState:
    """How the SuperLink sees a device.

    ``registered``, ``online``, ``offline``, ``unregistered`` or, never registered, ``unknown``.
    Also ``silent``: online for the SuperLink, but its heartbeat is overdue, so that it may be gone.
    `since` is when it became so, ISO 8601 in UTC; empty where that is not known. `heartbeat` is how
    many seconds ago the last one came, None where there was none or the device is not online.
    """

    device: Device
    status: str
    since: str
    heartbeat: float | None = None


@dataclass(frozen=True)
class RunState:
    """A run: ``pending``, ``starting``, ``running`` or ``finished``.

    `outcome` of a finished one is ``completed``, ``failed`` or ``stopped``; `folder` is where its
    results are, empty where that is not known; times are ISO 8601 in UTC, or empty.
    """

    run_id: int
    status: str
    outcome: str
    details: str
    folder: str
    pending_at: str
    running_at: str
    finished_at: str

    @property
    def finished(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.status == "finished"


def advice(fleet: Fleet, folder: Path) -> str:
    """Return what can be done about a run of `fleet` that goes on in `folder`."""
    run = f"{shlex.quote(str(fleet.path))} {shlex.quote(folder.name)}"
    return f"fedkn deploy follow {run} shows it, fedkn deploy stop {run} ends it"


class Control:
    """A connection to the Control API of the fleet's SuperLink. Use it in a ``with``.

    Its methods raise SuperLinkAway where nobody answers, FedknError where a request is refused.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._client = ControlHttpClient.from_server_address(
            fleet.superlink_address,
            insecure=False,
            root_certificates=fleet.authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedkn")],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def devices(self) -> list[DeviceState]:
        """Return the state of every device of the fleet, in the order of partitions."""
        nodes = self._ask(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        known = {node.public_key: node for node in nodes}
        states = []
        for device in self._fleet.devices:
            node = known.get(public_pem(self._fleet.public_key(device)))
            if node is None:
                states.append(DeviceState(device, "unknown", ""))
                continue
            since = {
                "registered": node.registered_at,
                "online": node.last_activated_at,
                "offline": node.last_deactivated_at,
            }.get(node.status, "")
            age = heartbeat_age(node) if node.status == "online" else None
            overdue = age is not None and age > node.heartbeat_interval
            states.append(DeviceState(device, "silent" if overdue else node.status, since, age))
        return states

    def register(self, device: Device) -> None:
        """Let `device` in: from now on its key opens the Fleet API."""
        key = public_pem(self._fleet.public_key(device))
        self._ask(
            lambda: self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=device.name))
        )

    def start(self, bundle: bytes, config: Mapping[str, Scalar]) -> int:
        """Start a run of the app in `bundle` with the dotted keys of `config`; return the run's id.

        Devices are sent no more of them than clients need.
        """
        whole = ExperimentConfig.resolve(config)
        run = RunFile(whole, advice(self._fleet, Path(whole.checkpoint.folder)))
        request = StartRunRequest(
            fab=Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle),
            override_config=user_config_to_proto(for_clients(run.config)),
        )
        answer = self._ask(lambda: self._client.StartRun(request))
        if not answer.HasField("run_id"):
            raise FedknError("the SuperLink did not start the run")
        write_run_file(self._fleet.run_files, answer.run_id, run)
        return answer.run_id

    def run(self, run_id: int) -> RunState:
        """Return the state of a run."""
        runs = self._ask(lambda: self._client.ListRuns(ListRunsRequest(run_id=run_id))).run_dict
        return self._state(runs[run_id])

    def runs(self) -> list[RunState]:
        """Return the last runs, newest first."""
        runs = self._ask(lambda: self._client.ListRuns(ListRunsRequest())).run_dict
        states = [self._state(run) for run in runs.values()]
        return sorted(states, key=lambda state: state.pending_at, reverse=True)

    def stop(self, run_id: int) -> None:
        """End a run; its checkpoints stay."""
        self._ask(lambda: self._client.StopRun(StopRunRequest(run_id=run_id)))

    def output(self, run_id: int) -> list[str]:
        """Return what the ServerApp of a finished run logged."""

        def read() -> list[str]:
            stream = self._client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=0.0))
            return "".join(part.log_output for part in stream).splitlines()

        return self._ask(read)

    def _state(self, run: Run) -> RunState:
        known = None
        # Whoever asks for all runs is not to fail for the damaged file of one.
        with suppress(UserError):
            known = read_run_file(self._fleet.run_files, run.run_id)
        return RunState(
            run_id=run.run_id,
            status=run.status.status,
            outcome=run.status.sub_status,
            details=run.status.details,
            folder=known.config.checkpoint.folder if known else "",
            pending_at=run.pending_at,
            running_at=run.running_at,
            finished_at=run.finished_at,
        )

    def _ask(self, question: Callable[[], AnswerT]) -> AnswerT:
        try:
            return question()
        except httpx.TransportError as error:
            raise SuperLinkAway(
                f"no SuperLink answers at {self._fleet.superlink_address} ({error}): "
                f"fedkn deploy up {self._fleet.path}"
            ) from None
        except httpx.HTTPStatusError as error:
            said = FlowerError.from_json(error.response.text)
            reason = said.message if said else f"HTTP status {error.response.status_code}"
            raise FedknError(f"the SuperLink refused: {reason}") from None
