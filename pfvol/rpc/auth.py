"""Who may speak the control RPC: proofs of the cluster secret, and the file that holds it. No sockets here.

The secret itself never leaves the process: each side proves it by an HMAC-SHA256 over both sides' fresh nonces.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from pfvol.errors import ConfigError, ConflictError

SECRET_BYTES = 32
NONCE_BYTES = 32
CLUSTER_ID_BYTES = 16


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def client_proof(secret: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return _proof(secret, b"rpc client" + server_nonce + client_nonce)


def server_proof(secret: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    return _proof(secret, b"rpc server" + client_nonce + server_nonce)


def same(a: bytes, b: bytes) -> bool:
    return hmac.compare_digest(a, b)


def create_secret(path: Path) -> bytes:
    """Makes a new cluster secret, readable by its owner only, durable before it is returned.

    Raises ``ConflictError`` when there is one already, ``ConfigError`` when it cannot be written.
    """
    secret = secrets.token_bytes(SECRET_BYTES)
    write_private(path, secret)
    return secret


def write_private(path: Path, content: bytes) -> None:
    """Makes a file of mode 0600 that holds content, or nothing: it appears whole under its name, or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(draft, path)
        finally:
            draft.unlink()
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except FileExistsError as error:
        raise ConflictError(f"{path} exists already") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def load_secret(path: Path) -> bytes:
    """The cluster secret; raises ``ConfigError`` when it is missing, of a wrong size, or open to other users."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(SECRET_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing: copy the cluster's secret there, or give [cluster] secret_file"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"{path} does not hold a cluster secret: expected {SECRET_BYTES} bytes")
    if mode & 0o077:
        raise ConfigError(f"{path} is open to other users: run chmod 600 {path}")
    return secret


def _proof(secret: bytes, text: bytes) -> bytes:
    return hmac.new(secret, text, hashlib.sha256).digest()
