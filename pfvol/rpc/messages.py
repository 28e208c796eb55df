"""The three kinds of messages of the control RPC, and the limits on what may stand in them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pfvol.errors import ProtocolError

METHOD_LENGTH_MAX = 64
REQUEST_ID_MAX = 2**63 - 1

REQUEST = 0
ANSWER = 1
NOTIFICATION = 2

Params = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    id: int
    method: str
    params: Params


@dataclass(frozen=True, slots=True)
class Answer:
    id: int
    error: dict[str, Any] | None
    """``Error.to_wire()`` of what went wrong; then there is no result."""
    result: Any


@dataclass(frozen=True, slots=True)
class Notification:
    method: str
    params: Params


Message = Request | Answer | Notification


def to_value(message: Message) -> list[Any]:
    match message:
        case Request(id, method, params):
            return [REQUEST, id, method, params]
        case Answer(id, error, result):
            return [ANSWER, id, error, result]
        case Notification(method, params):
            return [NOTIFICATION, method, params]


def from_value(value: Any) -> Message:
    """The message that a decoded value stands for; raises ``ProtocolError`` for anything that is none."""
    match value:
        case [int(kind), id, method, params] if kind == REQUEST and not isinstance(kind, bool):
            return Request(_id(id), _method(method), _params(params))
        case [int(kind), id, None, result] if kind == ANSWER and not isinstance(kind, bool):
            return Answer(_id(id), None, result)
        case [int(kind), id, dict(error), None] if kind == ANSWER and not isinstance(kind, bool):
            return Answer(_id(id), error, None)
        case [int(kind), method, params] if kind == NOTIFICATION and not isinstance(kind, bool):
            return Notification(_method(method), _params(params))
    raise ProtocolError("a message that is neither a request nor an answer nor a notification")


def _id(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= REQUEST_ID_MAX:
        raise ProtocolError("a request id that is not a number in range")
    return value


def _method(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= METHOD_LENGTH_MAX:
        raise ProtocolError("a method name that is not a short text")
    return value


def _params(value: Any) -> Params:
    if not isinstance(value, dict):
        raise ProtocolError("parameters that are not a map")
    return value
