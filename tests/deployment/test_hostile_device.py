"""A registered device that gives instructions, and one that fills the disk, in a real fleet."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from clients.device.supernode import client_with
from fedkn.federation import arrays_record
from server.deployment import programs
from server.deployment.control import Control
from server.deployment.disk import disk_use
from server.deployment.fleet import Device, Fleet
from server.deployment.logs import last_lines
from server.deployment.ports import free_port
from server.deployment.processes import start, stop
from server.deployment.startup import bring_up
from tests.deployment.fleets import Run, a_fleet, wait_for

MIB = 2**20


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    """A server, an honest device, and the key of another."""
    with a_fleet(tmp_path_factory.mktemp("fleets") / "fleet", clients=2) as made:
        bring_up(made, local=True, say=lambda text: None)
        stop(made, [made.devices[1].name])
        yield made


class Hostile:
    """A device by its key, which says what it likes. Online until `close`."""

    def __init__(self, fleet: Fleet, device: Device) -> None:
        key = load_ssh_private_key(device.key.read_bytes(), password=None)
        self.client = client_with(device.certificate).from_server_address(
            fleet.superlink_address,
            False,
            fleet.authority.read_bytes(),
            interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
        )
        own = ActivateNodeRequest(
            public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30
        )
        deadline = time.monotonic() + 200
        while True:
            try:
                self.node = Node(node_id=self.client.ActivateNode(own).node_id)
                break
            except httpx.HTTPStatusError:
                assert time.monotonic() < deadline
                time.sleep(1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._stay)
        self._thread.start()

    def _stay(self) -> None:
        beat = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=30)
        while not self._ended.wait(5):
            self.client.SendNodeHeartbeat(beat)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        # Or the device itself is refused for as long as this one counts as online.
        self.client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))
        self.client.close()

    def instruction(self) -> Message:
        """Wait for an instruction, fetch all of it, and return it without its content."""
        deadline = time.monotonic() + 200
        while True:
            answer = self.client.PullMessages(PullMessagesRequest(node=self.node))
            if answer.messages_list:
                break
            assert time.monotonic() < deadline
            time.sleep(0.3)
        message = message_from_proto(answer.messages_list[0])
        TaskIdentity.run_id = message.metadata.run_id
        TaskIdentity.node_id = self.node.node_id
        TaskIdentity.task_id = 1
        for one in iterate_object_tree(answer.message_object_trees[0]):
            self.client.PullObject(
                PullObjectRequest(
                    node=self.node, run_id=message.metadata.run_id, object_id=one.object_id
                )
            )
        return message

    def push(self, message: Message) -> int:
        """Push a message with all that it consists of; return how many bytes were taken."""
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        proto = message_to_proto(remove_content_from_message(message))
        answer = self.client.PushMessages(
            PushMessagesRequest(
                node=self.node,
                messages_list=[proto],
                message_object_trees=[get_object_tree(message)],
                clientapp_runtime_list=[0.1],
            )
        )
        taken = 0
        for object_id in answer.objects_to_push:
            content = objects[object_id].deflate()
            request = PushObjectRequest(
                node=self.node,
                run_id=message.metadata.run_id,
                session_id=answer.session_id,
                object_id=object_id,
                object_content=content,
            )
            try:
                self.client.PushObject(request)
            except httpx.HTTPStatusError as error:
                if error.response.status_code != 413:
                    raise
                return taken
            taken += len(content)
        return taken


def on_disk(fleet: Fleet) -> int:
    return dict(disk_use(fleet))["SuperLink's database"]


def test_a_device_neither_instructs_another_nor_fills_the_disk(fleet):
    honest = fleet.devices[0]
    with Run(
        fleet, "hostile", rounds=1, cohort=2, server__join_timeout=120, server__round_timeout=120
    ) as run:
        hostile = Hostile(fleet, fleet.devices[1])
        try:
            asked = hostile.instruction()
            online = set(node_ids(fleet)) - {hostile.node.node_id}
            (victim,) = online
            forged = Message(
                RecordDict({"config": ConfigRecord({"x": 1})}),
                dst_node_id=victim,
                message_type="query",
            )
            forged.metadata.__dict__["_src_node_id"] = 1
            with pytest.raises(httpx.HTTPStatusError) as refused:
                hostile.push(forged)
            assert refused.value.response.status_code == 403
            assert "a device sends replies of its own" in refused.value.response.text
            before = on_disk(fleet)
            arrays = {f"{n}": np.random.default_rng(n).bytes(MIB) for n in range(300)}
            large = {k: np.frombuffer(v, np.uint8) for k, v in arrays.items()}
            taken = hostile.push(
                Message(RecordDict({"arrays": arrays_record(large)}), reply_to=asked)
            )
            # It was sent less than a MiB: twice that, and 16 MiB.
            assert 14 * MIB < taken < 19 * MIB
            most = on_disk(fleet)
            assert most - before < 60 * MIB
            code, output = run.end()
        finally:
            hostile.close()
    assert code == 1, output
    # The run has ended: what was stored for it is gone, and the disk has its room back.
    with Control(fleet) as control:
        assert control.runs()[0].finished
    wait_for(lambda: on_disk(fleet) < before + 4 * MIB)
    said = "\n".join(last_lines(fleet, "superlink", 10_000))
    assert "that it may store" in said
    assert "refused: an instruction" not in "\n".join(last_lines(fleet, honest.name, 10_000))


def node_ids(fleet: Fleet) -> list[int]:
    """Return the nodes that are online."""
    from flwr.proto.control_pb2 import ListNodesRequest

    with Control(fleet) as control:
        nodes = control._client.ListNodes(ListNodesRequest()).nodes_info
    return [node.node_id for node in nodes if node.status == "online"]


def test_an_unsigned_instruction_of_the_superlink_itself_is_not_done(fleet):
    """What a device might get past the SuperLink: the ClientApp refuses it, and says so."""
    stop(fleet, [programs.SUPEREXEC])
    unsigned = programs.superexec(fleet)
    environment = {k: v for k, v in unsigned.environment.items() if k != "FEDKN_SIGNING_KEY"}
    start(fleet, programs.Program(unsigned.name, unsigned.command, environment))
    device = fleet.devices[1]
    start(fleet, programs.supernode(fleet, device, fleet.superlink_address, free_port()))
    with Run(fleet, "unsigned", rounds=1, cohort=2, server__join_timeout=60) as run:
        code, output = run.end()
    assert code == 1, output
    assert "refused: an instruction that the fleet's server did not sign" in output
