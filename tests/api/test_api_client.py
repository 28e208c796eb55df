"""The REST client against servers that misbehave: every failure is one of our errors, and says what to do."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from pfvol.client import AsyncClient, Client, Endpoint, api_url, error_of, find_endpoint, read_cluster
from pfvol.errors import (
    CapacityError,
    ConfigError,
    InvalidError,
    NotFoundError,
    ProtocolError,
    TimedOutError,
    UnauthorizedError,
    UnreachableError,
)

Serve = Callable[[bytes | None], str]


@pytest.fixture
def server() -> Iterator[Serve]:
    """``server(answer)``: an address that answers each request with these bytes, or (None) never."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []
    release = threading.Event()

    def make(answer: bytes | None) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def run() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    if answer is None:
                        release.wait()
                    else:
                        connection.sendall(answer)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield make
    release.set()
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for thread in threads:
        thread.join()


def answer(status: str, body: bytes, media_type: str = "application/json") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def endpoint(address: str, token: str | None = None) -> Endpoint:
    return Endpoint(api_url(address), token)


@pytest.mark.parametrize(
    ("sent", "error", "said"),
    [
        (b"", UnreachableError, "was lost before the answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", UnreachableError, "may or may not have been made"),
        (b"SSH-2.0-OpenSSH\r\n", UnreachableError, "was lost before the answer"),
        (answer("200 OK", b"<html>", "text/html"), ProtocolError, "did not answer in JSON"),
        (answer("500 Oops", b"<html>", "text/html"), ProtocolError, "answered 500"),
        (answer("404 Not Found", b'{"detail": "Not Found"}'), ProtocolError, "is it pfvol that listens there"),
        (answer("404 Not Found", b'{"code": "not_found", "detail": "no volume"}'), NotFoundError, "no volume"),
        (answer("409 Conflict", b'{"code": "capacity", "detail": "full"}'), CapacityError, "full"),
        (answer("401 Unauthorized", b'{"code": "unauthorized", "detail": "no"}'), UnauthorizedError, "PFVOL_TOKEN"),
    ],
)
def test_bad_answers(server: Serve, sent: bytes, error: type[Exception], said: str) -> None:
    with Client(endpoint(server(sent))) as client, pytest.raises(error, match=said):
        client.get("/vol/list")


def test_no_answer_in_time(server: Serve) -> None:
    with Client(endpoint(server(None)), timeout_seconds=0.1) as client, pytest.raises(TimedOutError):
        client.post("/vol/create", name="v")


async def test_async_client(server: Serve) -> None:
    """Goal: the same on trio, without blocking the loop."""
    async with AsyncClient(endpoint(server(answer("200 OK", b"[1, 2]")))) as client:
        assert await client.get("/vol/list") == [1, 2]
    async with AsyncClient(endpoint(server(None)), timeout_seconds=0.1) as client:
        with pytest.raises(TimedOutError):
            await client.delete("/vol/v")
    with trio.move_on_after(0.05) as scope:
        async with AsyncClient(endpoint(server(None))) as client:
            await client.get("/vol/list")
    assert scope.cancelled_caught


async def test_async_client_unreachable() -> None:
    async with AsyncClient(endpoint("127.0.0.1:1")) as client:
        with pytest.raises(UnreachableError):
            await client.patch("/pool/p", name="q")


@pytest.mark.parametrize("token", ["caf\xe9", "two\nlines", "nul\0"])
def test_tokens_that_are_none(token: str) -> None:
    """Goal: told as what it is, not as a lost connection; and nothing can be smuggled into the request."""
    with pytest.raises(ConfigError, match="PFVOL_TOKEN"):
        Client(endpoint("127.0.0.1:1", token))


def test_error_details_survive() -> None:
    error = error_of(409, {"code": "capacity", "detail": "full", "details": {"free_bytes": 5}})
    assert isinstance(error, CapacityError)
    assert error.details == {"free_bytes": 5}


def test_schema_errors_are_invalid_input() -> None:
    assert isinstance(error_of(422, {"code": "invalid", "detail": "size_gb: no number", "details": {}}), InvalidError)


# -- how the API is found


@pytest.fixture
def cluster_dir(tmp_path: Path) -> Path:
    document = {"api": "http://127.0.0.1:7000", "token": "t0", "mdm": "127.0.0.1:7001"}
    (tmp_path / "cluster.json").write_text(json.dumps(document))
    return tmp_path


def find(data_dir: Path, **given: object) -> Endpoint:
    wanted = {"api": None, "mdm": None, "token": None, "config": None} | given
    return find_endpoint(data_dir=data_dir, **wanted)  # type: ignore[arg-type]


def test_endpoint_of_the_data_dir(cluster_dir: Path) -> None:
    assert find(cluster_dir) == ("http://127.0.0.1:7000", "t0")
    assert find(cluster_dir, token="given") == ("http://127.0.0.1:7000", "given")


def test_named_api_comes_first_and_its_token_is_not_another_clusters(cluster_dir: Path) -> None:
    """Goal: a local cluster's token never goes to another server."""
    assert find(cluster_dir, api="other:80") == ("http://other:80", None)
    assert find(cluster_dir, api="other:80", token="t") == ("http://other:80", "t")
    assert find(cluster_dir, api="http://127.0.0.1:7000/") == ("http://127.0.0.1:7000", "t0")


def test_named_api_needs_no_data_dir(tmp_path: Path) -> None:
    """Goal: what is broken there is no concern of a command that names its API."""
    (tmp_path / "cluster.json").write_text("{")
    assert find(tmp_path, api="other:80") == ("http://other:80", None)
    assert find(tmp_path / "none" / "such", api="other:80", token="t") == ("http://other:80", "t")


def test_named_mdm(cluster_dir: Path) -> None:
    assert find(cluster_dir, mdm="127.0.0.1:7001") == ("http://127.0.0.1:7000", "t0")
    assert find(cluster_dir, mdm="elsewhere:8010") == ("http://elsewhere:8000", None)


def test_endpoint_of_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "mdm1").mkdir()
    (tmp_path / "mdm1" / "token").write_text("secret\n")
    config = tmp_path / "node.toml"
    config.write_text(f'[node]\nname = "mdm1"\ndata_dir = "{tmp_path}"\n[cluster]\nmdm = "10.0.0.1:8010"\n')
    assert find(tmp_path / "none", config=config) == ("http://10.0.0.1:8000", "secret")


def test_nothing_configured(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="pfvol cluster up"):
        find(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"api": 1}', "\x00"])
def test_damaged_cluster_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "cluster.json").write_text(content)
    with pytest.raises(ConfigError, match=r"cluster\.json"):
        read_cluster(tmp_path)


@pytest.mark.parametrize("text", ["ftp://x", "http://", "http:///"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        api_url(text)


@pytest.mark.parametrize(
    ("bind", "host"), [("10.0.0.7", "10.0.0.7"), ("::1", "[::1]"), ("0.0.0.0", "127.0.0.1"), (None, "127.0.0.1")]
)
def test_the_api_of_an_mdms_own_configuration_is_where_it_listens(tmp_path: Path, bind: str | None, host: str) -> None:
    config = tmp_path / "node.toml"
    config.write_text("[node]\n" + (f'bind = "{bind}"\n' if bind else ""))
    found = find_endpoint(api=None, mdm=None, token=None, data_dir=tmp_path, config=config)
    assert found.url == f"http://{host}:8000"


def test_a_configuration_that_is_no_tables_is_told_so(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text("mdm = 3\n")
    with pytest.raises(ConfigError, match="must be tables"):
        find_endpoint(api=None, mdm=None, token=None, data_dir=tmp_path, config=config)
