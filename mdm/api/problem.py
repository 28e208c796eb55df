"""Errors as ``application/problem+json``: ``code title status detail details`` of one ``pfvol.errors`` leaf each."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from pfvol.errors import Error, InternalError, InvalidError, NotFoundError, UnauthorizedError

MEDIA_TYPE = "application/problem+json"


def problem(status: int, code: str, detail: str, details: dict[str, Any] | None = None) -> JSONResponse:
    body = {
        "type": "about:blank",
        "code": code,
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "details": details or {},
    }
    headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
    return JSONResponse(body, status_code=status, media_type=MEDIA_TYPE, headers=headers)


def problem_response(error: Error) -> JSONResponse:
    return problem(error.http_status, error.code, error.message, error.details)


def install(app: FastAPI) -> None:
    """Makes every failure of a route a problem document."""
    app.add_exception_handler(Error, _expected)
    app.add_exception_handler(RequestValidationError, _schema)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _bug)


async def _expected(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Error)
    return problem_response(error)


async def _schema(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if broken := next((item for item in error.errors() if item["type"] == "json_invalid"), None):
        # No schema was ever looked at: bad input, as where a size does not parse.
        return problem(
            HTTPStatus.BAD_REQUEST,
            InvalidError.code,
            f"the body is not JSON: {broken['ctx']['error']} at character {broken['loc'][-1]}",
        )
    # Without what was sent and without exception objects: neither is for JSON.
    errors = [{"at": _where(item["loc"]), "problem": item["msg"]} for item in error.errors()]
    line = "; ".join(f"{item['at']}: {item['problem']}" for item in errors)
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, InvalidError.code, line, {"errors": errors})


def _where(location: tuple[int | str, ...]) -> str:
    """``("body", "size_gb")`` as ``size_gb``: people know what they sent where."""
    parts = [str(part) for part in location if part not in ("body", "query", "path")]
    return ".".join(parts) or str(location[0])


async def _http(request: Request, error: Exception) -> JSONResponse:
    """What the router itself refuses: an unknown path, a wrong method, a body that is not JSON."""
    assert isinstance(error, HTTPException)
    route = f"{request.method} {request.url.path}"
    if error.status_code == HTTPStatus.NOT_FOUND:
        return problem(error.status_code, NotFoundError.code, f"no route {route}; see /docs")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        return problem(error.status_code, InvalidError.code, f"no route {route}; allowed here: {allowed}")
    code = UnauthorizedError.code if error.status_code == HTTPStatus.UNAUTHORIZED else InvalidError.code
    return problem(error.status_code, code, str(error.detail))


async def _bug(_request: Request, error: Exception) -> JSONResponse:
    """The server re-raises after this answer, so the traceback is in its log."""
    detail = f"a bug: {type(error).__name__}; the MDM's log has the traceback"
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, InternalError.code, detail)
