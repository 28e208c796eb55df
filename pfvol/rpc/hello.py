"""The first three messages of a connection: versions, and each side's proof that it knows the cluster secret.

Everything here is bounded in size and time, and nothing is believed before its proof. See
docs/internals/control-rpc.md.
"""

from __future__ import annotations

from typing import Any

from pfvol.config import check_name
from pfvol.constants import HANDSHAKE_TIMEOUT_SECONDS, RPC_VERSION
from pfvol.errors import ConflictError, DeniedError, Error, InvalidError, ProtocolError, UnauthorizedError, VersionError
from pfvol.rpc import auth, codec
from pfvol.rpc.session import Peer
from pfvol.rpc.transport import Transport

CLIENT_ROLES = ("sds", "sdc")


async def greet_server(
    transport: Transport, *, secret: bytes, role: str, name: str, cluster_id: bytes | None = None
) -> Peer:
    """The client's part. Raises what the server refuses us with, ``UnauthorizedError`` when it cannot prove itself."""
    hello = await _receive(transport)
    _check_version(hello)
    server_nonce, server_cluster = _bytes(hello, "nonce", auth.NONCE_BYTES), _cluster_id(hello)
    nonce = auth.new_nonce()
    await transport.send(
        codec.encode(
            {
                "pfvol": RPC_VERSION,
                "nonce": nonce,
                "proof": auth.client_proof(secret, server_nonce, nonce),
                "role": role,
                "name": name,
                "cluster_id": cluster_id,
            }
        ),
        HANDSHAKE_TIMEOUT_SECONDS,
    )
    answer = await _receive(transport)
    if isinstance(error := answer.get("error"), dict):
        raise Error.from_wire(error)
    proof = _bytes(answer, "proof", auth.NONCE_BYTES)
    if not auth.same(proof, auth.server_proof(secret, nonce, server_nonce)):
        raise UnauthorizedError(f"{transport.address} does not know the cluster secret")
    return Peer("mdm", "", transport.address, server_cluster)


async def greet_client(transport: Transport, *, secret: bytes, cluster_id: bytes) -> Peer:
    """The server's part. A client that is refused is told why, and the error is raised."""
    nonce = auth.new_nonce()
    await transport.send(
        codec.encode({"pfvol": RPC_VERSION, "nonce": nonce, "cluster_id": cluster_id}), HANDSHAKE_TIMEOUT_SECONDS
    )
    try:
        hello = await _receive(transport)
        peer, client_nonce = _believe(hello, transport.address, nonce, secret, cluster_id)
    except ProtocolError:
        raise  # It does not speak this protocol: nothing we could say would be understood.
    except (VersionError, UnauthorizedError, DeniedError, ConflictError, InvalidError) as error:
        await transport.send(codec.encode({"error": error.to_wire()}), HANDSHAKE_TIMEOUT_SECONDS)
        raise
    proof = auth.server_proof(secret, client_nonce, nonce)
    await transport.send(codec.encode({"proof": proof}), HANDSHAKE_TIMEOUT_SECONDS)
    return peer


def _believe(hello: dict[str, Any], address: str, nonce: bytes, secret: bytes, cluster_id: bytes) -> tuple[Peer, bytes]:
    _check_version(hello)
    client_nonce = _bytes(hello, "nonce", auth.NONCE_BYTES)
    proof = _bytes(hello, "proof", auth.NONCE_BYTES)
    if not auth.same(proof, auth.client_proof(secret, nonce, client_nonce)):
        raise UnauthorizedError("wrong cluster secret: copy the secret file of the cluster to this node")
    role, name = hello.get("role"), hello.get("name")
    if role not in CLIENT_ROLES:
        raise DeniedError("a connection to the control port is of an SDS or an SDC")
    if not isinstance(name, str):
        raise ProtocolError("a hello without a name")
    check_name(name)
    theirs = None if hello.get("cluster_id") is None else _cluster_id(hello)
    if theirs is not None and theirs != cluster_id:
        raise ConflictError(f"{name} belongs to cluster {theirs.hex()}, not to {cluster_id.hex()}")
    return Peer(str(role), name, address, theirs), client_nonce


async def _receive(transport: Transport) -> dict[str, Any]:
    value = await transport.receive(
        codec.HELLO_BYTES_MAX, idle_seconds=HANDSHAKE_TIMEOUT_SECONDS, frame_seconds=HANDSHAKE_TIMEOUT_SECONDS
    )
    if not isinstance(value, dict):
        raise ProtocolError(f"{transport.address} does not speak pfvol's control protocol")
    return value


def _check_version(hello: dict[str, Any]) -> None:
    version = hello.get("pfvol")
    if not isinstance(version, int) or isinstance(version, bool):
        raise ProtocolError("a hello without a version")
    if version != RPC_VERSION:
        raise VersionError(
            f"the other side speaks control protocol {version}, this one {RPC_VERSION}: update the older"
        )


def _bytes(hello: dict[str, Any], key: str, length: int) -> bytes:
    value = hello.get(key)
    if not isinstance(value, bytes) or len(value) != length:
        raise ProtocolError(f"a hello without a {key} of {length} bytes")
    return value


def _cluster_id(hello: dict[str, Any]) -> bytes:
    return _bytes(hello, "cluster_id", auth.CLUSTER_ID_BYTES)
