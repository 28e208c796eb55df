"""The handshake on the data port: who is at the other end, proven with the secret, before an engine gets the socket.

Owns the four bodies (HELLO, CHALLENGE, PROOF, WELCOME) and the socket's settings. Assumes that every byte received is
hostile until its proof holds. Promises: nothing of a peer is believed before its proof; a proof is good for one
handshake only (both sides give a fresh nonce) and in one direction only (each side's proof has a prefix of its own, so
a proof sent back to its maker is worth nothing); not one byte beyond the handshake is read, since what follows belongs
to the engine; everything ends within HANDSHAKE_TIMEOUT_SECONDS.

The functions above the line "trio" are pure; ``connect`` and ``accept`` move their bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import trio

from datapath import wire
from pfvol.constants import CONNECT_TIMEOUT_SECONDS, HANDSHAKE_TIMEOUT_SECONDS
from pfvol.errors import ConflictError, ProtocolError, TimedOutError, UnauthorizedError, UnreachableError

NONCE_BYTES: Final = 32
PROOF_BYTES: Final = 32
SHARD_COUNT: Final = 1

_HELLO: Final = struct.Struct("<B3sIQ16sI4s32s")
_CHALLENGE: Final = struct.Struct("<IIQQ16s32s")
HELLO_BYTES: Final = _HELLO.size
CHALLENGE_BYTES: Final = _CHALLENGE.size + PROOF_BYTES
assert (HELLO_BYTES, CHALLENGE_BYTES) == (72, 104)
assert max(HELLO_BYTES, CHALLENGE_BYTES) <= wire.CONTROL_BODY_MAX

# Two full frames in flight each way without a wait for the reader. The kernel caps what an unprivileged process asks
# for (and stops its own tuning once asked), so only the privileged form is used: who lacks the right keeps the kernel's
# tuning.
SOCKET_BUFFER_BYTES: Final = 2 * 1024 * 1024
KEEPALIVE_IDLE_SECONDS: Final = 5
KEEPALIVE_INTERVAL_SECONDS: Final = 2
KEEPALIVE_PROBES: Final = 3
# Of what was sent, then the connection is lost. The kernel would send it again at twice the interval each time: after a
# cut of 30 s, or to a host that has lost its power and is back, nothing would go through for another 30 s.
UNACKNOWLEDGED_SECONDS: Final = 3
_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h; Python does not name them
_SO_RCVBUFFORCE: Final = 33


class OldSessionError(ConflictError):
    """A newer session of the same node has been admitted: this one is over for good."""

    code = "old_session"


class NotReadyError(UnreachableError):
    """The SDS does not take this node at the moment: it is having it left out of its sets."""

    code = "not_ready"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who connected, as proven: role is wire.ROLE_SDC or wire.ROLE_SDS."""

    role: int
    node_id: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The SDS that answered, as proven."""

    sds_id: int
    incarnation: int
    durable_incarnation: int


@dataclass(frozen=True, slots=True)
class Hello:
    """What a client states of itself and of whom it wants; believed once its proof holds."""

    peer: Peer
    cluster_id: bytes
    wanted_sds_id: int
    nonce: bytes


def build_hello(hello: Hello) -> bytes:
    return _HELLO.pack(
        hello.peer.role,
        b"\0\0\0",
        hello.peer.node_id,
        hello.peer.incarnation,
        hello.cluster_id,
        hello.wanted_sds_id,
        b"\0\0\0\0",
        hello.nonce,
    )


def parse_hello(body: bytes) -> Hello:
    """Raises ProtocolError when a field is out of its range."""
    if len(body) != HELLO_BYTES:
        raise ProtocolError(f"a HELLO has {HELLO_BYTES} bytes, this one has {len(body)}")
    role, zeros, node_id, incarnation, cluster_id, wanted, zeros_too, nonce = _HELLO.unpack(body)
    if role not in (wire.ROLE_SDC, wire.ROLE_SDS):
        raise ProtocolError(f"HELLO of role {role}, which does not exist")
    if zeros.strip(b"\0") or zeros_too.strip(b"\0"):
        raise ProtocolError("HELLO with reserved bytes set")
    if node_id == 0 or incarnation == 0 or (role == wire.ROLE_SDS and node_id > 0xFFFF):
        raise ProtocolError(f"HELLO of node {node_id}, incarnation {incarnation}: out of range")
    return Hello(Peer(role, node_id, incarnation), cluster_id, wanted, nonce)


def build_challenge(secret: bytes, hello_body: bytes, info: ServerInfo, cluster_id: bytes, nonce: bytes) -> bytes:
    unproven = _CHALLENGE.pack(info.sds_id, SHARD_COUNT, info.incarnation, info.durable_incarnation, cluster_id, nonce)
    return unproven + _proof(secret, b"pfvol server", hello_body, unproven)


def parse_challenge(secret: bytes, hello: Hello, hello_body: bytes, body: bytes) -> ServerInfo:
    """Raises UnauthorizedError when the server does not know the secret or is not the SDS that was wanted."""
    if len(body) != CHALLENGE_BYTES:
        raise ProtocolError(f"a CHALLENGE has {CHALLENGE_BYTES} bytes, this one has {len(body)}")
    unproven = body[: _CHALLENGE.size]
    if not hmac.compare_digest(body[_CHALLENGE.size :], _proof(secret, b"pfvol server", hello_body, unproven)):
        raise UnauthorizedError("the SDS does not know this cluster's secret")
    sds_id, shards, incarnation, durable_incarnation, cluster_id, _nonce = _CHALLENGE.unpack(unproven)
    if cluster_id != hello.cluster_id:
        raise UnauthorizedError("the SDS belongs to another cluster")
    if sds_id != hello.wanted_sds_id:
        raise UnauthorizedError(f"SDS {sds_id} answered where SDS {hello.wanted_sds_id} was expected")
    if shards != SHARD_COUNT or not 0 < durable_incarnation <= incarnation:
        raise ProtocolError(f"CHALLENGE with {shards} shards, incarnation {incarnation}/{durable_incarnation}")
    return ServerInfo(sds_id, incarnation, durable_incarnation)


def client_proof(secret: bytes, hello_body: bytes, challenge_body: bytes) -> bytes:
    return _proof(secret, b"pfvol client", hello_body, challenge_body)


def check_client_proof(secret: bytes, hello_body: bytes, challenge_body: bytes, proof: bytes) -> bool:
    return hmac.compare_digest(proof, client_proof(secret, hello_body, challenge_body))


def _proof(secret: bytes, prefix: bytes, *bodies: bytes) -> bytes:
    # The bodies have fixed sizes, so the concatenation can be read in one way only.
    return hmac.new(secret, prefix + b"".join(bodies), hashlib.sha256).digest()


_REFUSALS: Final[dict[int, tuple[type[UnauthorizedError | ConflictError | UnreachableError], str]]] = {
    wire.ST_NOT_AUTHORIZED: (UnauthorizedError, "the SDS refused this node: wrong cluster secret, cluster or SDS"),
    wire.ST_OLD_SESSION: (OldSessionError, "a newer session of this node has been admitted"),
    wire.ST_NOT_READY: (NotReadyError, "the SDS does not take this node at the moment"),
    wire.ST_SHUTTING_DOWN: (UnreachableError, "the SDS is shutting down"),
    wire.ST_BUSY: (UnreachableError, "the SDS serves as many nodes as it can"),
}


def check_welcome(status: int) -> None:
    """Raises what the server's refusal means; returns when it is OK."""
    if status == wire.ST_OK:
        return
    if status in _REFUSALS:
        error, message = _REFUSALS[status]
        raise error(message)
    raise ProtocolError(f"the SDS ended the handshake with status {status}")


# -- trio


async def connect(
    host: str,
    port: int,
    *,
    secret: bytes,
    cluster_id: bytes,
    role: int,
    node_id: int,
    incarnation: int,
    sds_id: int,
) -> tuple[int, ServerInfo]:
    """Connects to an SDS's data port and shakes hands.

    Returns a non-blocking socket's fd, which the caller owns, and who answered.

    Raises UnreachableError, TimedOutError, UnauthorizedError, OldSessionError, ProtocolError.
    """
    where = f"SDS {sds_id} at {host}:{port}"
    try:
        with trio.fail_after(CONNECT_TIMEOUT_SECONDS):
            stream = await trio.open_tcp_stream(host, port)
    except trio.TooSlowError:
        raise TimedOutError(f"{where} did not accept within {CONNECT_TIMEOUT_SECONDS:g} s") from None
    except OSError as error:
        raise UnreachableError(f"{where} cannot be reached: {error}") from None
    hello = Hello(Peer(role, node_id, incarnation), cluster_id, sds_id, os.urandom(NONCE_BYTES))
    with _closed_on_failure(stream), _one_deadline(where):
        info = await _client_side(stream, secret, hello)
    stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_SECONDS * 1000)
    return _detach(stream), info


async def accept(
    stream: trio.SocketStream,
    *,
    secret: bytes,
    cluster_id: bytes,
    sds_id: int,
    incarnation: int,
    durable_incarnation: int,
    admit: Callable[[Peer], int],
) -> tuple[int, Peer]:
    """Shakes hands with whoever connected: a non-blocking socket's fd, which the caller owns, and who it is.

    ``admit`` is asked once the proof holds; it returns wire.ST_OK or the status to refuse with. The stream is closed
    (or detached) in any case. Raises what ``connect`` raises; the caller logs it, nothing of it is the SDS's own fault.
    """
    info = ServerInfo(sds_id, incarnation, durable_incarnation)
    with _closed_on_failure(stream), _one_deadline("the client"):
        peer = await _server_side(stream, secret, cluster_id, info, admit)
    return _detach(stream), peer


async def _client_side(stream: trio.SocketStream, secret: bytes, hello: Hello) -> ServerInfo:
    hello_body = build_hello(hello)
    await _send(stream, wire.OP_HELLO, hello_body)
    challenge = await _receive(stream, wire.OP_CHALLENGE, CHALLENGE_BYTES)
    info = parse_challenge(secret, hello, hello_body, challenge)
    await _send(stream, wire.OP_PROOF, client_proof(secret, hello_body, challenge))
    await _receive(stream, wire.OP_WELCOME, 0)
    return info


async def _server_side(
    stream: trio.SocketStream, secret: bytes, cluster_id: bytes, info: ServerInfo, admit: Callable[[Peer], int]
) -> Peer:
    hello_body = await _receive(stream, wire.OP_HELLO, HELLO_BYTES)
    hello = parse_hello(hello_body)
    if hello.cluster_id != cluster_id or hello.wanted_sds_id != info.sds_id:
        await _send(stream, wire.OP_WELCOME, b"", wire.ST_NOT_AUTHORIZED)
        raise UnauthorizedError(f"a client looks for SDS {hello.wanted_sds_id} of cluster {hello.cluster_id.hex()}")
    challenge = build_challenge(secret, hello_body, info, cluster_id, os.urandom(NONCE_BYTES))
    await _send(stream, wire.OP_CHALLENGE, challenge)
    proof = await _receive(stream, wire.OP_PROOF, PROOF_BYTES)
    if not check_client_proof(secret, hello_body, challenge, proof):
        await _send(stream, wire.OP_WELCOME, b"", wire.ST_NOT_AUTHORIZED)
        raise UnauthorizedError("a client does not know the cluster's secret")
    status = admit(hello.peer)
    await _send(stream, wire.OP_WELCOME, b"", status)
    check_welcome(status)
    return hello.peer


@contextlib.contextmanager
def _closed_on_failure(stream: trio.SocketStream) -> Iterator[None]:
    """Not the stream's own ``async with``: closing awaits, and who is cancelled there would lose the detached fd."""
    try:
        yield
    except BaseException:
        stream.socket.close()
        raise


@contextlib.contextmanager
def _one_deadline(who: str) -> Iterator[None]:
    """Bounds the block, and maps what sockets and deadlines raise in it to this project's errors."""
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT_SECONDS):
            yield
    except trio.TooSlowError:
        raise TimedOutError(f"{who} did not finish the handshake within {HANDSHAKE_TIMEOUT_SECONDS:g} s") from None
    except trio.BrokenResourceError:
        raise UnreachableError(f"{who} closed the connection during the handshake") from None


async def _send(stream: trio.SocketStream, opcode: int, body: bytes, status: int = wire.ST_OK) -> None:
    await stream.send_all(wire.pack_header(opcode, status=status, body_length=len(body)) + body)


async def _receive(stream: trio.SocketStream, opcode: int, body_bytes: int) -> bytes:
    """The body of the one frame that may come now; a WELCOME in its place is the server's refusal."""
    try:
        header = wire.unpack_header(await _receive_exactly(stream, wire.HEADER_SIZE))
    except wire.BadFrameError as error:
        raise ProtocolError(f"a bad frame during the handshake: {error}") from None
    got, size = header["opcode"], header["body_length"]
    if got == wire.OP_WELCOME and opcode in (wire.OP_CHALLENGE, wire.OP_WELCOME):
        check_welcome(header["status"])
    if got != opcode or size != body_bytes:
        raise ProtocolError(f"opcode {got} with {size} bytes came where {opcode} with {body_bytes} was due")
    return await _receive_exactly(stream, body_bytes)


async def _receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    """``size`` bytes and not one more: the rest of the stream is the engine's."""
    parts = bytearray()
    while len(parts) < size:
        part = await stream.receive_some(size - len(parts))
        if not part:
            raise UnreachableError("the connection was closed during the handshake")
        parts += part
    return bytes(parts)


def _detach(stream: trio.SocketStream) -> int:
    """Takes the socket from trio, set up for an engine. Nothing may await between this and giving the fd an owner."""
    sock = stream.socket
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # trio asks for a low mark that suits a program which writes when it may; the engine wants the whole buffer (0:
    # kernel default).
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    # trio's epoll must forget the fd before an engine's epoll gets it: the number lives on, so trio cannot notice by
    # itself.
    trio.lowlevel.notify_closing(sock)
    return sock.detach()
