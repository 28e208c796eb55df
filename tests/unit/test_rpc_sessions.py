"""Sessions over real sockets: calls both ways, their ends, and a server that outlives whatever is sent to it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio

from pfvol.constants import RPC_VERSION
from pfvol.errors import (
    ConflictError,
    DeniedError,
    Error,
    InternalError,
    NotFoundError,
    ProtocolError,
    TimedOutError,
    UnauthorizedError,
    UnreachableError,
    VersionError,
)
from pfvol.rpc import auth, codec
from pfvol.rpc.client import Reconnecting, connect
from pfvol.rpc.server import Server
from pfvol.rpc.session import IN_FLIGHT_MAX, Session
from pfvol.rpc.transport import listen
from tests.support.waiting import pass_time, poll_until_async

SECRET = b"s" * 32
CLUSTER = b"c" * 16
Address = tuple[str, int]


class Echo:
    """A service that answers a few methods and remembers who is there."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.told: list[Any] = []
        self.running = 0
        self.running_most = 0
        self.gate = trio.Event()

    def opened(self, session: Session) -> None:
        self.sessions.append(session)

    def closed(self, session: Session) -> None:
        self.sessions.remove(session)

    async def handle(self, session: Session, method: str, params: dict[str, Any]) -> Any:
        match method:
            case "echo":
                return params
            case "whoami":
                return [session.peer.role, session.peer.name]
            case "tell":
                self.told.append(params["n"])
            case "missing":
                raise NotFoundError("not here", thing="x")
            case "bug":
                raise KeyError("a bug of the handler")
            case "unsendable":
                return object()
            case "grouped":
                async with trio.open_nursery():
                    raise DeniedError("from a nursery")
            case "back":
                return await session.call("double", params)
            case "wait":
                self.running += 1
                self.running_most = max(self.running_most, self.running)
                await self.gate.wait()
                self.running -= 1
        return None


async def no_handler(method: str, params: dict[str, Any]) -> Any:
    raise NotFoundError(f"no method {method}")


@asynccontextmanager
async def serving(service: Echo, port: int = 0) -> AsyncIterator[Address]:
    server = Server(service, secret=SECRET, cluster_id=CLUSTER)
    async with trio.open_nursery() as nursery:

        async def run(*, task_status: trio.TaskStatus[Address]) -> None:
            await server.run("127.0.0.1", port, task_status=task_status)

        yield await nursery.start(run)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def session_to(address: Address, handler: Any = no_handler, **options: Any) -> AsyncIterator[Session]:
    given = {"secret": SECRET, "role": "sds", "name": "s1"} | options
    session = await connect(address, handler=handler, **given)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        yield session
        nursery.cancel_scope.cancel()


until = partial(poll_until_async, timeout_seconds=10)


async def test_calls_and_errors_come_back() -> None:
    async with serving(Echo()) as address, session_to(address) as session:
        assert session.peer.cluster_id == CLUSTER
        assert await session.call("echo", {"x": [1, b"y", None, 1.5, {"z": {7: 8}}]}) == {
            "x": [1, b"y", None, 1.5, {"z": {7: 8}}]
        }
        assert await session.call("whoami") == ["sds", "s1"]
        with pytest.raises(NotFoundError, match="not here") as caught:
            await session.call("missing")
        assert caught.value.details == {"thing": "x"}
        with pytest.raises(DeniedError, match="from a nursery"):
            await session.call("grouped")


async def test_a_bug_in_a_handler_is_an_error_of_that_call_only() -> None:
    async with serving(Echo()) as address, session_to(address) as session:
        for method in ("bug", "unsendable"):
            with pytest.raises(InternalError):
                await session.call(method)
        assert await session.call("echo", {"n": 1}) == {"n": 1}


async def test_the_server_calls_back_on_the_same_connection_while_it_answers() -> None:
    async def double(method: str, params: dict[str, Any]) -> Any:
        return params["n"] * 2

    async with serving(Echo()) as address, session_to(address, double) as session:
        assert await session.call("back", {"n": 21}) == 42


async def test_notifications_keep_their_order() -> None:
    service = Echo()
    async with serving(service) as address, session_to(address) as session:
        for n in range(200):
            await session.notify("tell", {"n": n})
        await until(lambda: len(service.told) == 200)
    assert service.told == list(range(200))


async def test_calls_are_pipelined_and_bounded() -> None:
    """Many more calls than the limit: all are answered, never more than the limit at once."""
    service = Echo()
    async with serving(service) as address, session_to(address) as session:
        done = 0

        async def one() -> None:
            nonlocal done
            await session.call("wait")
            done += 1

        async with trio.open_nursery() as nursery:
            for _ in range(3 * IN_FLIGHT_MAX):
                nursery.start_soon(one)
            await until(lambda: service.running == IN_FLIGHT_MAX)
            service.gate.set()
        assert done == 3 * IN_FLIGHT_MAX
        assert service.running_most == IN_FLIGHT_MAX


async def test_a_late_answer_is_a_timeout_and_the_session_goes_on() -> None:
    service = Echo()
    async with serving(service) as address, session_to(address) as session:
        with pytest.raises(TimedOutError):
            await session.call("wait", timeout=0.05)
        service.gate.set()
        assert await session.call("echo", {"n": 1}) == {"n": 1}


async def test_requests_beyond_the_limit_are_refused_not_queued() -> None:
    """A client that gave up on its calls still has them running at the server."""
    service = Echo()
    async with serving(service) as address, session_to(address) as session:

        async def give_up() -> None:
            with pytest.raises(TimedOutError):
                await session.call("wait", timeout=0.2)

        async with trio.open_nursery() as nursery:
            for _ in range(IN_FLIGHT_MAX):
                nursery.start_soon(give_up)
        with pytest.raises(ConflictError, match="in flight"):
            await session.call("echo")
        service.gate.set()
        await until(lambda: service.running == 0)
        assert await session.call("echo", {"n": 1}) == {"n": 1}


async def test_calls_in_flight_end_when_the_connection_does() -> None:
    service = Echo()
    async with serving(service) as address, session_to(address) as session:
        async with trio.open_nursery() as nursery:

            async def lost() -> None:
                with pytest.raises(UnreachableError):
                    await session.call("wait")

            nursery.start_soon(lost)
            await until(lambda: service.running == 1)
            service.sessions[0].close("told to")
        await session.closed.wait()
        with pytest.raises(UnreachableError):
            await session.call("echo")
        with pytest.raises(UnreachableError):
            await session.notify("tell", {"n": 1})
        await until(lambda: not service.sessions)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"secret": b"t" * 32}, UnauthorizedError),
        ({"cluster_id": b"d" * 16}, ConflictError),
        ({"role": "mdm"}, DeniedError),
        ({"name": "../x"}, Error),
    ],
)
async def test_who_does_not_belong_here_is_told_why(options: dict[str, Any], error: type[Error]) -> None:
    service = Echo()
    async with serving(service) as address:
        with pytest.raises(error):
            async with session_to(address, **options):
                pass
        assert not service.sessions
        async with session_to(address) as session:
            assert await session.call("echo", {"n": 1}) == {"n": 1}


async def test_a_server_without_the_secret_is_not_believed() -> None:
    """It accepts any client, but cannot prove that it knows the secret."""
    listener = await listen("127.0.0.1", 0)
    address = listener.socket.getsockname()[:2]

    async def impostor() -> None:
        async with await listener.accept() as stream:
            hello = {"pfvol": RPC_VERSION, "nonce": b"n" * 32, "cluster_id": CLUSTER}
            await stream.send_all(codec.encode(hello))
            await stream.receive_some(4096)
            await stream.send_all(codec.encode({"proof": b"p" * 32}))
            await stream.receive_some(1)

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(impostor)
        with pytest.raises(UnauthorizedError):
            await connect(address, secret=SECRET, role="sds", name="s1", handler=no_handler)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("greeting", "error"),
    [
        (codec.encode({"pfvol": RPC_VERSION + 1, "nonce": b"n" * 32, "cluster_id": CLUSTER}), VersionError),
        (codec.encode({"nonce": b"n" * 32}), ProtocolError),
        (codec.encode([1]), ProtocolError),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError),
        (b"", UnreachableError),
    ],
)
async def test_something_else_listens_there(greeting: bytes, error: type[Error]) -> None:
    listener = await listen("127.0.0.1", 0)
    address = listener.socket.getsockname()[:2]

    async def other() -> None:
        async with await listener.accept() as stream:
            if greeting:
                await stream.send_all(greeting)
                await stream.receive_some(1)

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(other)
        with pytest.raises(error):
            await connect(address, secret=SECRET, role="sds", name="s1", handler=no_handler)
        nursery.cancel_scope.cancel()


async def test_nobody_listens_there() -> None:
    listener = await listen("127.0.0.1", 0)
    address = listener.socket.getsockname()[:2]
    await listener.aclose()
    with pytest.raises(UnreachableError):
        await connect(address, secret=SECRET, role="sds", name="s1", handler=no_handler)


async def test_a_port_in_use_is_a_clear_error() -> None:
    async with serving(Echo()) as (host, port):
        with pytest.raises(ConflictError, match=f"{port} is in use"):
            await listen(host, port)


async def raw(address: Address) -> tuple[trio.SocketStream, dict[str, Any]]:
    """A connection that does as it likes, and the server's hello."""
    stream = await trio.open_tcp_stream(*address)
    data = b""
    while len(data) < 4 or len(data) < 4 + codec.body_length(data[:4]):
        data += await stream.receive_some(4096)
    return stream, codec.decode(data[4:])


def proven(hello: dict[str, Any], **changes: Any) -> bytes:
    nonce = b"m" * 32
    proof = auth.client_proof(SECRET, hello["nonce"], nonce)
    mine = {"pfvol": RPC_VERSION, "nonce": nonce, "proof": proof, "role": "sds", "name": "raw", "cluster_id": None}
    return codec.encode(mine | changes)


async def assert_hung_up(stream: trio.SocketStream) -> None:
    with trio.fail_after(10):
        try:
            while await stream.receive_some(4096):
                pass
        except trio.BrokenResourceError:
            pass
    await stream.aclose()


@pytest.mark.parametrize(
    "changes",
    [
        {"pfvol": 99},
        {"pfvol": "1"},
        {"nonce": b"short"},
        {"proof": b"x" * 32},
        {"proof": None},
        {"role": ["sds"]},
        {"name": 7},
        {"name": ""},
        {"cluster_id": b"x"},
    ],
)
async def test_a_hello_with_any_field_wrong_is_hung_up_on(changes: dict[str, Any]) -> None:
    service = Echo()
    async with serving(service) as address:
        stream, hello = await raw(address)
        await stream.send_all(proven(hello, **changes))
        await assert_hung_up(stream)
        assert not service.sessions


@pytest.mark.parametrize(
    "garbage",
    [
        codec.LENGTH.pack(2**32 - 1),
        codec.LENGTH.pack(0),
        codec.LENGTH.pack(3) + b"\xff\xff\xff",
        codec.encode([9, 1, "m", {}]),
        codec.encode([0, 1, "m", [1]]),
        codec.encode([1, 12345, None, None]),  # an answer to what was never asked
        codec.LENGTH.pack(300) + b"\x91" * 299 + b"\x01",
        codec.encode([2, "tell", {}]) * 3000,  # refused one by one, the session may end: the server may not
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_after_the_hello_garbage_ends_the_connection_and_nothing_else(garbage: bytes) -> None:
    service = Echo()
    async with serving(service) as address, session_to(address) as other:
        stream, hello = await raw(address)
        await stream.send_all(proven(hello))
        await until(lambda: len(service.sessions) == 2)
        await stream.send_all(garbage)
        await stream.send_eof()
        await assert_hung_up(stream)
        await until(lambda: len(service.sessions) == 1)
        assert await other.call("echo", {"n": 1}) == {"n": 1}


async def test_random_bytes_before_and_after_the_hello() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    service = Echo()
    async with serving(service) as address, session_to(address) as other:
        for turn in range(60):
            stream, hello = await raw(address)
            noise = rng.randbytes(rng.randrange(1, 400))
            if turn % 3 == 1:
                noise = codec.LENGTH.pack(len(noise)) + noise
            try:
                await stream.send_all((proven(hello) if turn % 2 else b"") + noise)
                await stream.send_eof()
            except trio.BrokenResourceError:
                pass
            await assert_hung_up(stream)
        await until(lambda: len(service.sessions) == 1)
        assert await other.call("echo", {"n": 1}) == {"n": 1}


async def test_silence_and_half_frames_end_a_connection(autojump_clock: trio.testing.MockClock) -> None:
    """Over memory instead of sockets the clock can jump: a peer that says nothing more is given up in time."""
    from pfvol.constants import SDS_DOWN_AFTER_SECONDS
    from pfvol.rpc.session import Peer

    class Dead:
        """A transport whose other side is frozen: it takes everything and says nothing."""

        address = "nowhere"
        ended_by_peer = False

        async def receive(self, limit: int = 0, *, idle_seconds: float, frame_seconds: float = 1.0) -> Any:
            await pass_time(idle_seconds)
            raise TimedOutError("nothing heard in time")

        async def send(self, frames: bytes, timeout_seconds: float = 1.0) -> None:
            await trio.lowlevel.checkpoint()

        async def close(self) -> None:
            await trio.lowlevel.checkpoint()

    session = Session(Dead(), Peer("sds", "s1", "nowhere", None), no_handler)  # type: ignore[arg-type]
    started = trio.current_time()
    await session.run()
    assert trio.current_time() - started == pytest.approx(SDS_DOWN_AFTER_SECONDS)
    assert "nothing heard" in session.close_reason
    assert not session.ended_by_peer


async def test_reconnecting_waits_introduces_itself_and_comes_back() -> None:
    service, introductions = Echo(), []
    listener = await listen("127.0.0.1", 0)
    host, port = listener.socket.getsockname()[:2]
    await listener.aclose()

    async def introduce(session: Session) -> None:
        introductions.append(await session.call("whoami"))

    mdm = Reconnecting(host, port, secret=SECRET, role="sdc", name="c1", handler=no_handler, on_connected=introduce)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mdm.run)
        with pytest.raises(UnreachableError):
            await mdm.call("echo", {"n": 0}, timeout=0.1)
        with pytest.raises(UnreachableError):
            await mdm.notify("tell", {"n": 0})
        async with serving(service, port):
            assert await mdm.call("echo", {"n": 1}) == {"n": 1}
            assert mdm.connected
        await until(lambda: not mdm.connected)
        async with serving(service, port):
            assert await mdm.call("echo", {"n": 2}) == {"n": 2}
            assert introductions == [["sdc", "c1"], ["sdc", "c1"]]
        nursery.cancel_scope.cancel()


async def test_reconnecting_says_why_it_is_refused() -> None:
    async with serving(Echo()) as (host, port):
        mdm = Reconnecting(host, port, secret=b"t" * 32, role="sdc", name="c1", handler=no_handler)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mdm.run)
            with pytest.raises(UnauthorizedError):
                await mdm.call("echo", timeout=0.5)
            nursery.cancel_scope.cancel()


async def test_a_failed_introduction_is_tried_again() -> None:
    service, tries = Echo(), 0

    async def introduce(session: Session) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            await session.call("missing")

    async with serving(service) as (host, port):
        mdm = Reconnecting(host, port, secret=SECRET, role="sdc", name="c1", handler=no_handler, on_connected=introduce)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mdm.run)
            assert await mdm.call("echo", {"n": 1}) == {"n": 1}
            assert tries == 3
            nursery.cancel_scope.cancel()
