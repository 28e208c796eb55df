"""Goal: the handshake lets in who knows the secret, believes nothing before, and leaves the stream to the engine."""

from __future__ import annotations

import hmac
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from datapath import wire
from pfvol import handshake
from pfvol.constants import HANDSHAKE_TIMEOUT_SECONDS
from pfvol.errors import Error, ProtocolError, TimedOutError, UnauthorizedError, UnreachableError

SECRET = bytes(range(32))
CLUSTER = bytes(range(16))
SERVER: dict[str, Any] = {"secret": SECRET, "cluster_id": CLUSTER, "sds_id": 3} | {
    "incarnation": 9,
    "durable_incarnation": 8,
}
CLIENT: dict[str, Any] = {
    "secret": SECRET, "cluster_id": CLUSTER, "role": wire.ROLE_SDC, "node_id": 5, "incarnation": 2, "sds_id": 3,
}  # fmt: skip
HELLO = handshake.Hello(handshake.Peer(wire.ROLE_SDC, 5, 2), CLUSTER, 3, bytes(32))


class Acceptance:
    """One accept() on a loopback port, and what became of it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.done = trio.Event()
        self.result: tuple[int, handshake.Peer] | None = None
        self.error: Error | None = None


@asynccontextmanager
async def accepting(
    admit: Callable[[handshake.Peer], int] = lambda peer: wire.ST_OK, **changes: Any
) -> AsyncIterator[Acceptance]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    acceptance = Acceptance(listener.socket.getsockname()[1])

    async def serve() -> None:
        stream = await listener.accept()
        try:
            acceptance.result = await handshake.accept(stream, admit=admit, **{**SERVER, **changes})
        except Error as error:
            acceptance.error = error
        acceptance.done.set()

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield acceptance
        nursery.cancel_scope.cancel()
    if acceptance.result is not None:
        os.close(acceptance.result[0])


async def raw(acceptance: Acceptance) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", acceptance.port)


async def exactly(stream: trio.SocketStream, size: int) -> bytes:
    received = b""
    while len(received) < size and (part := await stream.receive_some(size - len(received))):
        received += part
    return received


async def all_that_comes(stream: trio.SocketStream) -> bytes:
    received = b""
    try:
        while part := await stream.receive_some(65536):
            received += part
    except trio.BrokenResourceError:
        pass  # closed with unread bytes of ours: a reset
    return received


def frame(opcode: int, body: bytes, **fields: int) -> bytes:
    return wire.pack_header(opcode, body_length=len(body), **fields) + body


def test_the_bodies_are_the_documented_ones() -> None:
    """Written out byte by byte: a change here is another protocol version."""
    hello = handshake.build_hello(HELLO)
    assert hello.hex() == "01000000050000000200000000000000" + CLUSTER.hex() + "0300000000000000" + "00" * 32
    nonce = b"n" * 32
    challenge = handshake.build_challenge(SECRET, hello, handshake.ServerInfo(3, 9, 8), CLUSTER, nonce)
    unproven = bytes.fromhex("030000000100000009000000000000000800000000000000") + CLUSTER + nonce
    assert challenge[:72] == unproven
    assert challenge[72:] == hmac.new(SECRET, b"pfvol server" + hello + unproven, "sha256").digest()
    proof = hmac.new(SECRET, b"pfvol client" + hello + challenge, "sha256").digest()
    assert handshake.client_proof(SECRET, hello, challenge) == proof
    assert handshake.parse_hello(hello) == HELLO
    assert handshake.parse_challenge(SECRET, HELLO, hello, challenge) == handshake.ServerInfo(3, 9, 8)


async def test_both_sides_learn_who_the_other_is_and_bytes_sent_early_stay_in_the_socket() -> None:
    with trio.fail_after(5):
        async with accepting() as acceptance:
            fd, info = await handshake.connect("127.0.0.1", acceptance.port, **CLIENT)
            with socket.socket(fileno=fd) as client:
                client.send(b"the engine's")
                await acceptance.done.wait()
                assert acceptance.result is not None
                assert info == handshake.ServerInfo(3, 9, 8)
                assert acceptance.result[1] == handshake.Peer(wire.ROLE_SDC, 5, 2)
                server = socket.socket(fileno=os.dup(acceptance.result[0]))
                with server:
                    server.settimeout(2)
                    assert server.recv(100) == b"the engine's"


async def test_the_socket_is_set_up_for_an_engine() -> None:
    with trio.fail_after(5):
        async with accepting() as acceptance:
            fd, _ = await handshake.connect("127.0.0.1", acceptance.port, **CLIENT)
            with socket.socket(fileno=fd) as client:
                assert not os.get_blocking(fd)
                assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) in (0, 2**32 - 1, -1)
                if os.geteuid() == 0:
                    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 1024 * 1024


async def test_bytes_that_follow_the_proof_at_once_are_not_swallowed() -> None:
    with trio.fail_after(5):
        async with accepting() as acceptance, await raw(acceptance) as stream:
            hello = handshake.build_hello(HELLO)
            await stream.send_all(frame(wire.OP_HELLO, hello))
            challenge = (await exactly(stream, wire.HEADER_SIZE + handshake.CHALLENGE_BYTES))[wire.HEADER_SIZE :]
            proof = handshake.client_proof(SECRET, hello, challenge)
            await stream.send_all(frame(wire.OP_PROOF, proof) + b"pipelined")
            await acceptance.done.wait()
            assert acceptance.result is not None
            assert os.read(acceptance.result[0], 100) == b"pipelined"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"secret": bytes(32)}, UnauthorizedError),
        ({"cluster_id": bytes(16)}, UnauthorizedError),
        ({"sds_id": 4}, UnauthorizedError),
    ],
)
async def test_a_client_of_another_secret_cluster_or_sds_is_refused(change: dict[str, Any], error: type[Error]) -> None:
    with trio.fail_after(5):
        async with accepting() as acceptance:
            with pytest.raises(error):
                await handshake.connect("127.0.0.1", acceptance.port, **{**CLIENT, **change})
            await acceptance.done.wait()
            assert acceptance.result is None


async def test_a_client_that_skips_the_servers_proof_still_needs_its_own() -> None:
    with trio.fail_after(5):
        async with accepting() as acceptance, await raw(acceptance) as stream:
            await stream.send_all(frame(wire.OP_HELLO, handshake.build_hello(HELLO)))
            await exactly(stream, wire.HEADER_SIZE + handshake.CHALLENGE_BYTES)
            await stream.send_all(frame(wire.OP_PROOF, bytes(32)))
            answer = await all_that_comes(stream)
            assert wire.unpack_header(answer)["status"] == wire.ST_NOT_AUTHORIZED
            await acceptance.done.wait()
            assert isinstance(acceptance.error, UnauthorizedError)


async def test_the_servers_own_proof_sent_back_to_it_is_refused() -> None:
    with trio.fail_after(5):
        async with accepting() as acceptance, await raw(acceptance) as stream:
            await stream.send_all(frame(wire.OP_HELLO, handshake.build_hello(HELLO)))
            challenge = await exactly(stream, wire.HEADER_SIZE + handshake.CHALLENGE_BYTES)
            await stream.send_all(frame(wire.OP_PROOF, challenge[-32:]))
            await acceptance.done.wait()
            assert isinstance(acceptance.error, UnauthorizedError)


async def test_a_recorded_handshake_cannot_be_played_again() -> None:
    hello = handshake.build_hello(HELLO)
    recorded = b""
    with trio.fail_after(5):
        for attempt in range(2):
            async with accepting() as acceptance, await raw(acceptance) as stream:
                await stream.send_all(frame(wire.OP_HELLO, hello))
                challenge = (await exactly(stream, wire.HEADER_SIZE + handshake.CHALLENGE_BYTES))[wire.HEADER_SIZE :]
                recorded = recorded or frame(wire.OP_PROOF, handshake.client_proof(SECRET, hello, challenge))
                await stream.send_all(recorded)
                await acceptance.done.wait()
                assert (acceptance.result is None) == (attempt == 1)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (wire.ST_OLD_SESSION, handshake.OldSessionError),
        (wire.ST_SHUTTING_DOWN, UnreachableError),
        (wire.ST_NOT_AUTHORIZED, UnauthorizedError),
        (wire.ST_BUSY, UnreachableError),
    ],
)
async def test_a_refusal_says_why_on_both_sides(status: int, error: type[Error]) -> None:
    with trio.fail_after(5):
        async with accepting(admit=lambda peer: status) as acceptance:
            with pytest.raises(error):
                await handshake.connect("127.0.0.1", acceptance.port, **CLIENT)
            await acceptance.done.wait()
            assert isinstance(acceptance.error, error)


def bad_hellos() -> list[bytes]:
    good = handshake.build_hello(HELLO)

    def patched(offset: int, value: bytes) -> bytes:
        return good[:offset] + value + good[offset + len(value) :]

    bodies = [patched(0, b"\0"), patched(0, b"\3"), patched(1, b"\1"), patched(3, b"\1"), patched(4, bytes(4))]
    bodies += [patched(8, bytes(8)), patched(36, b"\1"), good[:-1], good + b"\0", b"", bytes(65536)]
    bodies.append(patched(4, b"\0\0\1\0")[:0] + b"\2" + patched(4, b"\0\0\1\0")[1:])  # an SDS number over 16 bits
    frames = [frame(wire.OP_HELLO, body) for body in bodies]
    frames += [frame(opcode, good) for opcode in (wire.OP_PROOF, wire.OP_WELCOME, wire.OP_CAPABILITY)]
    frames += [frame(wire.OP_READ, b"", length=4096), b"GET / HTTP/1.1\r\n\r\n" + bytes(80), bytes(200), b"\xff" * 200]
    header = bytearray(frame(wire.OP_HELLO, good))
    for offset in range(0, wire.HEADER_SIZE, 4):
        broken = bytearray(header)
        broken[offset] ^= 1
        frames.append(bytes(broken))
    return frames


@pytest.mark.parametrize("data", bad_hellos())
async def test_a_bad_first_frame_ends_the_connection_and_gets_no_challenge(data: bytes) -> None:
    with trio.fail_after(5):
        async with accepting() as acceptance, await raw(acceptance) as stream:
            await stream.send_all(data)
            assert await all_that_comes(stream) == b""
            await acceptance.done.wait()
            assert isinstance(acceptance.error, ProtocolError)


@pytest.mark.parametrize("sent", [0, 1, 79, 80, 151])
async def test_a_client_that_stops_talking_is_given_up(sent: int, autojump_clock: trio.testing.MockClock) -> None:
    async with accepting() as acceptance, await raw(acceptance) as stream:
        started = trio.current_time()
        await stream.send_all(frame(wire.OP_HELLO, handshake.build_hello(HELLO))[:sent])
        await acceptance.done.wait()
        assert isinstance(acceptance.error, TimedOutError)
        assert trio.current_time() - started == pytest.approx(HANDSHAKE_TIMEOUT_SECONDS, abs=0.5)


@pytest.mark.parametrize("sent", [0, 40, 100])
async def test_a_client_that_hangs_up_is_reported_as_gone(sent: int) -> None:
    with trio.fail_after(5):
        async with accepting() as acceptance:
            async with await raw(acceptance) as stream:
                await stream.send_all(frame(wire.OP_HELLO, handshake.build_hello(HELLO))[:sent])
            await acceptance.done.wait()
            assert isinstance(acceptance.error, UnreachableError)


@pytest.mark.parametrize("tampered", ["secret", "cluster", "sds", "flip", "short", "durable"])
async def test_a_false_server_is_found_out_before_the_client_proves_anything(tampered: str) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    after = bytearray()

    async def impostor() -> None:
        async with await listener.accept() as stream:
            hello = (await exactly(stream, wire.HEADER_SIZE + handshake.HELLO_BYTES))[wire.HEADER_SIZE :]
            info = handshake.ServerInfo(4 if tampered == "sds" else 3, 9, 10 if tampered == "durable" else 9)
            secret = bytes(32) if tampered == "secret" else SECRET
            cluster = bytes(16) if tampered == "cluster" else CLUSTER
            challenge = bytearray(handshake.build_challenge(secret, hello, info, cluster, bytes(32)))
            if tampered == "flip":
                challenge[8] ^= 1
            body = bytes(challenge[:-1] if tampered == "short" else challenge)
            await stream.send_all(frame(wire.OP_CHALLENGE, body))
            after.extend(await all_that_comes(stream))

    with trio.fail_after(5):
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(impostor)
            with pytest.raises((UnauthorizedError, ProtocolError)):
                await handshake.connect("127.0.0.1", listener.socket.getsockname()[1], **CLIENT)
    assert not after


async def test_nobody_there_and_nobody_answering(autojump_clock: trio.testing.MockClock) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(UnreachableError):
            await handshake.connect("127.0.0.1", bound.getsockname()[1], **CLIENT)
        bound.listen()
        with pytest.raises(TimedOutError):
            await handshake.connect("127.0.0.1", bound.getsockname()[1], **CLIENT)


async def test_no_descriptor_is_lost_whenever_the_client_is_cancelled() -> None:
    """Cancels connect() at each of its checkpoints in turn until it gets through."""
    with trio.fail_after(10):
        before = set(os.listdir("/proc/self/fd"))
        for allowed in range(100):
            async with accepting() as acceptance:
                fd = await _connect_with_checkpoints(acceptance.port, allowed)
                if fd is None:
                    continue
                os.close(fd)
                await acceptance.done.wait()
                break
        else:
            pytest.fail("connect never ended")
        assert allowed > 3
        assert set(os.listdir("/proc/self/fd")) == before


class _CancelAfter(trio.abc.Instrument):
    def __init__(self, scope: trio.CancelScope, task: trio.lowlevel.Task, steps: int) -> None:
        self._scope, self._task, self._steps = scope, task, steps

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._steps -= 1
            if self._steps < 0:
                self._scope.cancel()


async def _connect_with_checkpoints(port: int, steps: int) -> int | None:
    with trio.CancelScope() as scope:
        instrument = _CancelAfter(scope, trio.lowlevel.current_task(), steps)
        trio.lowlevel.add_instrument(instrument)
        try:
            fd, _ = await handshake.connect("127.0.0.1", port, **CLIENT)
            return fd
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return None
