"""Replies of a hostile device: an honest one as a tree of parts, changed at random, pushed.

Each part is put into the form that Flower's SuperLink takes (kind, children, length, body) after it
was changed, so that changes reach what lies behind the form; some are made to the form itself.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.common.serde import message_to_proto
from flwr.proto.error_pb2 import Error as ErrorProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import ConfigRecord as ConfigProto
from flwr.proto.recorddict_pb2 import MetricRecord as MetricProto
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_head_values_from_object_content,
)
from flwr.supercore.run import Run

from server.gate.arrivals import Arrivals
from tests.fuzz.mutation import NUMBERS, TEXTS, mutated_bytes, mutated_json

__all__ = ["Part", "arrived", "changed", "parts_of"]

_KINDS = ("Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk", "MetricRecord", "Context")


@dataclass
class Part:
    """A part: its children, and of records and arrays what their JSON says, children by index."""

    kind: str
    body: bytes
    children: list[Part] = field(default_factory=list)
    table: Any = None

    def written(self, into: dict[str, bytes]) -> str:
        """Add this part and those below to `into`, by id, and return its own."""
        names = [child.written(into) for child in self.children]
        body = self.body
        if self.table is not None:
            said = self.table
            if self.kind != "Array" and isinstance(said, dict):
                said = {key: _reference(names, value) for key, value in said.items()}
            try:
                body = json.dumps(said).encode("utf-8", "surrogatepass")
            except (RecursionError, ValueError):
                body = b"[" * 3000
        content = f"{self.kind} {','.join(names)} {len(body)}".encode() + b"\0" + body
        name = hashlib.sha256(content).hexdigest()
        into[name] = content
        return name

    def copied(self) -> Part:
        """Return a part that is changed by itself. What the tables hold is nobody's to change."""
        table = dict(self.table) if isinstance(self.table, dict) else self.table
        return Part(self.kind, self.body, [child.copied() for child in self.children], table)

    def all(self) -> list[Part]:
        """Return this part and those below."""
        return [self, *(part for child in self.children for part in child.all())]


def _reference(names: list[str], value: Any) -> Any:
    if type(value) is int and 0 <= value < len(names):
        return names[value]
    return value


def parts_of(message: Message) -> Part:
    """Return an honest message as a tree of parts."""
    objects: dict[str, InflatableObject] = get_all_nested_objects(message)
    contents = {key: one.deflate() for key, one in objects.items()}

    def part(name: str) -> Part:
        kind, children, _ = get_object_head_values_from_object_content(contents[name])
        body = contents[name].split(b"\0", 1)[1]
        table = None
        if kind in ("RecordDict", "ArrayRecord", "Array"):
            table = json.loads(body)
        if kind in ("RecordDict", "ArrayRecord"):
            table = {key: children.index(child) for key, child in table.items()}
        return Part(kind, body, [part(child) for child in children], table)

    return part(message.object_id)


def changed(rng: random.Random, root: Part) -> Part:
    """Change a tree of parts in one to three places, in place, and return it."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        part = rng.choice(root.all())
        if rng.random() < 0.4:
            # Most parts are chunks and arrays: what is above them is changed as often.
            above = [one for one in root.all() if one.kind not in ("Array", "ArrayChunk")]
            part = rng.choice(above or [root])
        _change(rng, part, root)
    return root


def _change(rng: random.Random, part: Part, root: Part) -> None:
    structure: list[Callable[[], None]] = [
        lambda: setattr(part, "kind", rng.choice(_KINDS)),
        lambda: part.children.append(rng.choice(root.all()).copied()),
        lambda: part.children.extend(part.children[:1] * rng.choice((1, 2, 50))),
        part.children.clear,
        lambda: rng.shuffle(part.children),
    ]
    if rng.random() < 0.25:
        rng.choice(structure)()
    elif part.kind == "Array" and isinstance(part.table, dict) and rng.random() < 0.3:
        part.table["arraychunk_ids"] = rng.choice(
            ([0] * rng.choice((2, 100, 5000)), [-1], [1], [], [True], [0.0], "0", [10**30])
        )
    elif part.table is not None:
        part.table = mutated_json(rng, part.table)
    elif part.kind == "MetricRecord":
        part.body = _metrics(rng, part.body)
    elif part.kind == "ConfigRecord":
        part.body = mutated_bytes(rng, part.body)
    elif part.kind == "Message":
        part.body = _message(rng, part)
    else:
        part.body = mutated_bytes(rng, part.body)


def _metrics(rng: random.Random, body: bytes) -> bytes:
    if rng.random() < 0.2:
        return mutated_bytes(rng, body)
    try:
        record = MetricProto.FromString(body)
    except Exception:
        return mutated_bytes(rng, body)
    items = list(record.items)
    item = rng.choice(items) if items else None
    match rng.randrange(6):
        case 0 if items:
            items.remove(item)
        case 1 if items:
            items.append(item)
        case 2:
            for number in range(rng.choice((1, 10, 10, 10, 10, 300))):
                items.append(_item(rng, f"{rng.choice(TEXTS)[:200]}{number}"))
        case _ if items:
            items[items.index(item)] = _item(rng, item.key)
    if rng.random() < 0.05:
        return ConfigProto().SerializeToString() + MetricProto(items=items).SerializeToString()
    return MetricProto(items=items).SerializeToString()


def _item(rng: random.Random, key: str) -> Any:
    item = MetricProto.Item()
    item.key = key.encode("utf-8", "replace").decode("utf-8", "replace")
    number = rng.choice(NUMBERS)
    whole = isinstance(number, int) and abs(number) < 2**63
    match rng.randrange(6):
        case 0:
            item.value.sint_list.vals.extend([1] * rng.choice((0, 1, 1000)))
        case 1:
            item.value.double_list.vals.extend([1.0, float("nan")])
        case 2:
            pass
        case _ if whole:
            item.value.sint64 = int(number)
        case _:
            item.value.double = (
                float(number) if isinstance(number, float) or abs(number) < 10**300 else 1e308
            )
    return item


def _message(rng: random.Random, part: Part) -> bytes:
    if rng.random() < 0.3:
        return mutated_bytes(rng, part.body)
    try:
        said = MessageProto.FromString(part.body)
    except Exception:
        return mutated_bytes(rng, part.body)
    if rng.random() < 0.6:
        reason = rng.choice(TEXTS) * rng.choice((1, 1, 100))
        text = reason.encode("utf-8", "replace").decode()
        said.error.CopyFrom(ErrorProto(code=rng.choice((0, 1, 2**31)), reason=text))
        if rng.random() < 0.7:
            part.children.clear()
    else:
        said.metadata.src_node_id = rng.choice((0, 1, 500, 2**63))
        said.metadata.ttl = rng.choice((0.0, -1.0, float("nan")))
        said.metadata.message_type = rng.choice(("train", "query", "x", ""))
        said.metadata.reply_to_message_id = rng.choice(
            ("", "other", said.metadata.reply_to_message_id)
        )
    return said.SerializeToString()


@dataclass
class _SuperLink:
    """Announces one reply and has its parts."""

    asked: str
    said: Any
    tree: ObjectTree
    parts: dict[str, bytes]

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802 - Flower's name
        answer = PullAppMessagesResponse()
        if self.asked in request.message_ids:
            answer.messages_list.append(self.said)
            answer.message_object_trees.append(self.tree)
        return answer

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        content = self.parts.get(request.object_id)
        if content is None:
            return PullObjectResponse(object_found=False)
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        pass


@dataclass
class _Deployed:
    _runtime_client: _SuperLink
    node: Node = field(default_factory=Node)
    run: Run = field(default_factory=lambda: Run.create_empty(1))


def arrived(
    rng: random.Random, honest: Message, root: Part, largest: int
) -> tuple[list[Message], dict[str, str]]:
    """Push what `root` has become as the reply that `honest` would be, and return what arrives."""
    parts: dict[str, bytes] = {}
    name = root.written(parts)
    if rng.random() < 0.1:
        victim = rng.choice(list(parts))
        parts[victim] = mutated_bytes(rng, parts[victim])
    tree = ObjectTree(object_id=name, children=[ObjectTree(object_id=one) for one in parts])
    said = message_to_proto(honest)
    said.metadata.message_id = name
    asked = honest.metadata.reply_to_message_id
    grid = _Deployed(_SuperLink(asked, said, tree, parts))
    arrivals = Arrivals(grid, largest)  # type: ignore[arg-type]
    whole: list[Message] = []
    lost: dict[str, str] = {}
    for _ in range(1000):
        some, gone = arrivals.pull([asked])
        whole, lost = [*whole, *some], lost | gone
        if not arrivals.begun:
            break
    return whole, lost
