"""Random requests against every route: whatever is sent, the answer is no bug, and the state stays sound."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mdm.api.app import create_app
from mdm.invariants import check
from tests.support.api import Api

REQUESTS = 250
SEEDS = (1, 2, 3, 4)

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, [], [1], ["/dev/null"], {}, {"a": 1},
    "", " ", "x", "list", "a/b", "..", "%2e", "\x00", "\ud7ff", "é" * 40, "x" * 65, "x" * 5000, "0" * 16, "1GiB", "5XB",
    "-1", "NaN",
)  # fmt: skip
PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "name": ("pd", "pool", "s1", "v1", "v2", "host", "other"),
    "provisioning": ("thin", "thick"),
    "access_mode": ("readWrite", "readOnly"),
    "policy": ("two_copies", "ec"),
    "durability": ("flush", "commit"),
    "cascade": ("false",),
    "devices": ([], ["/a", "/b"], ["/a", "/a"]),
    "type": ("VOLUME_CREATE",),
    "since": ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00"),
}
REFERENCES = ("pd", "pool", "s1", "s2", "s3", "v1", "v2", "host", "rack", "none")
SIZES = ("1MiB", 4096, 1.5, "1GiB", 10**9)


def value_for(rng: random.Random, field: str) -> Any:
    if rng.random() < 0.25:
        return rng.choice(HOSTILE)
    if field in PLAUSIBLE:
        return rng.choice(PLAUSIBLE[field])
    if field.endswith(("_bytes", "_gb")) or field in ("size", "capacity", "additional", "new_size"):
        return rng.choice(SIZES)
    if field.endswith(("_mbps", "_limit", "_seconds", "_percent")) or field in ("first", "count", "limit"):
        return rng.choice((0, 1, 50))
    return rng.choice(REFERENCES)


def operations() -> list[tuple[str, str, list[str], list[str]]]:
    """(method, path, fields of the body, parameters of the query) of every route."""
    document = create_app(None).openapi()  # type: ignore[arg-type]
    schemas = document["components"]["schemas"]
    found = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            name = content.get("$ref", "").rpartition("/")[2]
            body = list(schemas[name]["properties"]) if name else []
            query = [item["name"] for item in operation.get("parameters", []) if item["in"] == "query"]
            found.append((method.upper(), path, body, query))
    return found


def path_for(rng: random.Random, template: str) -> str:
    parts = [rng.choice(REFERENCES) if part.startswith("{") else part for part in template.split("/")]
    return "/".join(parts)


@pytest.mark.parametrize("seed", SEEDS)
async def test_random_requests(api: Api, seed: int) -> None:
    """Goal: no answer is a bug (500), every refusal is a problem document, the invariants hold after each change."""
    rng = random.Random(seed)
    await api.make_pool()
    await api.client.post("/sdc/add", name="host")
    routes = [route for route in operations() if "verify" not in route[1]]
    changes = 0
    for number in range(REQUESTS):
        method, template, fields, parameters = rng.choice(routes)
        path = path_for(rng, template)
        body = {field: value_for(rng, field) for field in fields if rng.random() < 0.5}
        query = {name: str(value_for(rng, name)) for name in parameters if rng.random() < 0.3}
        before = api.manager.state
        response = await api.request(method, path, params=query, **({"json": body} if fields else {}))
        said = f"seed {seed} request {number}: {method} {path} {query} {body}: {response.status_code} {response.text}"
        assert response.status_code < 500, said
        if response.status_code >= 400:
            assert response.headers["content-type"] == "application/problem+json", said
            assert response.json()["detail"], said
            assert api.manager.state is before, said
        elif api.manager.state is not before:
            changes += 1
            assert check(api.manager.state) == [], said
    assert changes > 0
