"""The one error tree: each leaf has its code, HTTP status, exit code and errno. Duplicate codes are refused at import.

An ``Error`` is an expected failure: its message is one line that says what to do. Anything else that reaches the top is
a bug. On the wire (RPC, REST) an error is ``{"code", "message", "details"}`` and comes back as the same class.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_CONFLICT = 4
EXIT_CAPACITY = 5
EXIT_DENIED = 6
EXIT_UNREACHABLE = 7
EXIT_TIMEOUT = 8
EXIT_INTEGRITY = 9

_by_code: dict[str, type[Error]] = {}


class Error(Exception):
    """Base of everything pfvol expects to go wrong."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = EXIT_BUG
    errno: ClassVar[int] = errno.EIO

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "code" not in cls.__dict__:
            raise TypeError(f"{cls.__name__} has no code of its own")
        if cls.code in _by_code:
            raise TypeError(f"error code {cls.code!r} is taken by {_by_code[cls.code].__name__}")
        _by_code[cls.code] = cls

    def to_wire(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "details": self.details}

    @staticmethod
    def from_wire(body: dict[str, Any]) -> Error:
        """The error as its sender raised it; one of an unknown code is an ``InternalError``."""
        cls = _by_code.get(str(body.get("code")), InternalError)
        details = body.get("details")
        return cls(str(body.get("message", "no message")), **(details if isinstance(details, dict) else {}))


class InternalError(Error):
    code = "internal"


class InvalidError(Error):
    """An argument that cannot be right: a size that does not parse, an illegal name, a bad option."""

    code = "invalid"
    http_status = 400
    exit_code = EXIT_USAGE
    errno = errno.EINVAL


class ConfigError(Error):
    """A configuration file, data directory or environment that cannot be used as it is."""

    code = "config"
    http_status = 400
    exit_code = EXIT_USAGE
    errno = errno.EINVAL


class VersionError(Error):
    """Data or a peer of another version."""

    code = "version"
    http_status = 409
    exit_code = EXIT_CONFLICT
    errno = errno.EPROTO


class NotFoundError(Error):
    code = "not_found"
    http_status = 404
    exit_code = EXIT_NOT_FOUND
    errno = errno.ENOENT


class ConflictError(Error):
    """Taken, in use, or in a state that does not allow it."""

    code = "conflict"
    http_status = 409
    exit_code = EXIT_CONFLICT
    errno = errno.EBUSY


class CapacityError(Error):
    code = "capacity"
    http_status = 409
    exit_code = EXIT_CAPACITY
    errno = errno.ENOSPC


class UnauthorizedError(Error):
    """No token, a wrong token, or a wrong cluster secret."""

    code = "unauthorized"
    http_status = 401
    exit_code = EXIT_DENIED
    errno = errno.EACCES


class DeniedError(Error):
    code = "denied"
    http_status = 403
    exit_code = EXIT_DENIED
    errno = errno.EPERM


class UnreachableError(Error):
    """Nobody answers at the address, or the connection was lost before the answer."""

    code = "unreachable"
    http_status = 503
    exit_code = EXIT_UNREACHABLE
    errno = errno.EHOSTUNREACH


class TimedOutError(Error):
    code = "timed_out"
    http_status = 504
    exit_code = EXIT_TIMEOUT
    errno = errno.ETIMEDOUT


class ProtocolError(Error):
    """The other side sent what no pfvol of this version sends."""

    code = "protocol"
    http_status = 502
    exit_code = EXIT_UNREACHABLE
    errno = errno.EPROTO


class IntegrityError(Error):
    """Stored data is not what it must be."""

    code = "integrity"
    http_status = 500
    exit_code = EXIT_INTEGRITY
    errno = errno.EIO


class DeviceError(Error):
    """An SDS device that cannot be opened or has failed."""

    code = "device"
    http_status = 500
    exit_code = EXIT_CONFLICT
    errno = errno.EIO
