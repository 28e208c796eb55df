"""What every request must pass before a route sees it: the bearer token, and a bound on its size.

A plain ASGI wrapper, so that nothing (documentation and unknown paths included) is answered without the token. Assumes
the token is a secret of the cluster; it is compared in constant time and never logged.
"""

from __future__ import annotations

import hmac
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from mdm.api.problem import problem_response
from pfvol.errors import Error, InvalidError, UnauthorizedError

OPEN_PATHS = frozenset({"/health"})
BODY_BYTES_MAX = 1024 * 1024  # the largest sensible body, a device list, is far smaller


class Gate:
    """Lets requests with the token through to ``app``."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            if scope["path"] not in OPEN_PATHS:
                self._authorize(headers.get(b"authorization"))
            _check_length(headers.get(b"content-length"))
        except Error as error:
            await problem_response(error)(scope, receive, send)
            return
        await self._app(scope, _bounded(receive), send)

    def _authorize(self, header: bytes | None) -> None:
        if header is None:
            raise UnauthorizedError("this needs the header `Authorization: Bearer TOKEN`")
        scheme, _, given = header.partition(b" ")
        if scheme.lower() != b"bearer":
            raise UnauthorizedError("the only authorization taken is `Bearer TOKEN`")
        if not hmac.compare_digest(given.strip(), self._token):
            raise UnauthorizedError("the token is wrong")


def _check_length(header: bytes | None) -> None:
    if header is not None and header.isdigit() and int(header) > BODY_BYTES_MAX:
        raise InvalidError(f"the body is larger than {BODY_BYTES_MAX} bytes")


def _bounded(receive: Receive) -> Receive:
    """``receive``, which fails once a body without a stated length has grown too large."""
    received = 0

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > BODY_BYTES_MAX:
            raise InvalidError(f"the body is larger than {BODY_BYTES_MAX} bytes")
        return message

    return bounded
