"""The server around the routes: the token, problem documents, limits, its port, and the schema as published."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from mdm.api.app import bind, create_app, serve
from mdm.api.auth import BODY_BYTES_MAX
from mdm.views import View
from pfvol.client import AsyncClient, Endpoint
from pfvol.errors import ConfigError, ConflictError, UnauthorizedError
from tests.support.api import TOKEN, Api
from tests.support.waiting import poll_until

GOLDEN = Path(__file__).parents[1] / "golden" / "openapi.json"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer \xff"],
)
@pytest.mark.parametrize("path", ["/vol/list", "/nonsense", "/openapi.json", "/docs", "/health/../vol/list"])
async def test_token_is_needed(api: Api, header: str, path: str) -> None:
    """Goal: without it nothing is told, not even what exists."""
    response = await api.request("GET", path, headers={"Authorization": header.encode("latin-1")})
    assert response.status_code == 401
    assert response.json()["code"] == "unauthorized"
    assert response.headers["www-authenticate"] == "Bearer"
    assert TOKEN not in response.text


async def test_client_without_a_token_is_told_where_it_is(api: Api) -> None:
    async with AsyncClient(Endpoint(api.endpoint.url, None)) as client:
        with pytest.raises(UnauthorizedError, match="PFVOL_TOKEN"):
            await client.post("/pd/create", name="pd")
        assert (await client.get("/health"))["status"] == "ok"
    assert api.manager.state.pds == {}


async def test_bearer_is_case_insensitive(api: Api) -> None:
    response = await api.request("GET", "/vol/list", headers={"Authorization": f"bearer {TOKEN}"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "said"),
    [
        ("GET", "/nonsense", 404, "not_found", "no route GET /nonsense"),
        ("GET", "/vol/none", 404, "not_found", "none"),
        ("GET", "/vol/a%2Fb", 404, "not_found", "no route"),
        ("PUT", "/vol/create", 405, "invalid", "no route PUT /vol/create"),
        ("DELETE", "/vol/list/x", 404, "not_found", "no route"),
        ("GET", "/vol/list?pool_id=none", 404, "not_found", "none"),
    ],
)
async def test_problem_documents(api: Api, method: str, path: str, status: int, code: str, said: str) -> None:
    response = await api.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert list(problem) == ["type", "code", "title", "status", "detail", "details"]
    assert (problem["code"], problem["status"]) == (code, status)
    assert said in problem["detail"]


async def test_bodies_are_bounded(api: Api) -> None:
    """Goal: a large body is refused, stated or not, and the server goes on."""
    stated = await api.request("POST", "/pd/create", content=b"x" * (BODY_BYTES_MAX + 1))
    assert stated.status_code == 400
    assert "larger than" in stated.json()["detail"]

    async def pieces() -> Any:
        for _ in range(BODY_BYTES_MAX // 65536 + 1):
            yield b" " * 65536

    streamed = await api.request("POST", "/pd/create", content=pieces(), headers={"Content-Type": "application/json"})
    assert streamed.status_code == 400
    assert (await api.client.post("/pd/create", name="pd"))["name"] == "pd"


async def test_many_clients_at_once(api: Api) -> None:
    """Goal: requests run beside each other; names stay unique."""
    outcomes: list[str] = []

    async def create(name: str) -> None:
        async with AsyncClient(api.endpoint) as client:
            try:
                await client.post("/pd/create", name=name)
                outcomes.append("made")
            except ConflictError:
                outcomes.append("taken")

    async with trio.open_nursery() as nursery:
        for index in range(20):
            nursery.start_soon(create, f"pd{index % 5}")
    assert sorted(outcomes) == ["made"] * 5 + ["taken"] * 15
    assert len(await api.client.get("/pd/list")) == 5


async def test_port_in_use(api: Api) -> None:
    port = int(api.endpoint.url.rpartition(":")[2])
    with pytest.raises(ConflictError, match=f"cannot listen on 127.0.0.1:{port}.*api_port"):
        bind("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("no.such.host.invalid", 0)])
def test_addresses_that_cannot_be_bound(host: str, port: int) -> None:
    with pytest.raises((ConfigError, ConflictError)):
        bind(host, port)


async def test_stop_frees_the_port_and_leaks_nothing(api: Api) -> None:
    """Goal: cancelled, the server closes its socket; the port can be had again."""
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            host, port = await nursery.start(partial(serve, api.orchestrator, host="127.0.0.1", port=0, token=TOKEN))
            async with AsyncClient(Endpoint(f"http://{host}:{port}", TOKEN)) as client:
                assert await client.get("/pd/list") == []
            nursery.cancel_scope.cancel()
        bind(host, port).close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def published() -> dict[str, Any]:
    """What clients rely on: routes, their parameters and answers, and the fields of every schema."""
    document = create_app(None).openapi()  # type: ignore[arg-type]
    routes = {}
    for path, operations in sorted(document["paths"].items()):
        for method, operation in sorted(operations.items()):
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            routes[f"{method.upper()} {path}"] = {
                "parameters": [parameter["name"] for parameter in operation.get("parameters", [])],
                "body": body.get("$ref", "").rpartition("/")[2] or None,
                "answers": sorted(operation["responses"]),
            }
    schemas = {
        name: {"fields": sorted(schema.get("properties", {})), "required": sorted(schema.get("required", []))}
        for name, schema in sorted(document["components"]["schemas"].items())
        if not name.startswith("HTTPValidation") and name != "ValidationError"
    }
    return {"routes": routes, "schemas": schemas}


def test_published_schema_is_the_golden_one() -> None:
    """Goal: what clients rely on changes on purpose only. PFVOL_UPDATE_GOLDEN=1 writes the new one."""
    found = published()
    if os.environ.get("PFVOL_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(GOLDEN.read_text())


def test_openapi_asks_for_the_token() -> None:
    document = create_app(None).openapi()  # type: ignore[arg-type]
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert document["paths"]["/health"]["get"]["security"] == []


async def test_a_bug_is_told_and_logged(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Goal: the caller learns that it was a bug and no more; the traceback is in the log; the server goes on."""

    def broken(_view: View) -> None:
        raise ZeroDivisionError("a secret of the inside")

    with monkeypatch.context() as patch:
        patch.setattr(View, "system", broken)
        response = await api.request("GET", "/system/status")
    assert response.status_code == 500
    assert response.json()["code"] == "internal"
    assert "ZeroDivisionError" in response.json()["detail"]
    assert "secret" not in response.text
    await trio.to_thread.run_sync(poll_until, lambda: "in broken" in caplog.text)  # logged after the answer
    assert (await api.client.get("/system/status"))["health"] == "OK"
