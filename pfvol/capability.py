"""Capabilities: what an SDC shows an SDS to be served a volume. Pure functions.

Owns the layout and the signature. Assumes that the key is the cluster's capability key, which the MDM makes and only
SDSs get: an SDC carries its capabilities but cannot make or change one. Promises that ``verify`` returns only what was
signed with the key, for this SDC and this volume, and has not expired; whether the mapping still exists is not said by
a capability but by the volume's mapping list.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import Final

from pfvol.errors import DeniedError, InvalidError

CAPABILITY_VERSION: Final = 1
MODE_READ_ONLY: Final = 1
MODE_READ_WRITE: Final = 2
KEY_BYTES: Final = 32

_BODY: Final = struct.Struct("<BB2sIQQQ")  # version, mode, zeros, sdc id, volume id, mapping id, expires
_SIGNATURE_BYTES: Final = 32
CAPABILITY_BYTES: Final = _BODY.size + _SIGNATURE_BYTES
assert CAPABILITY_BYTES == 64


@dataclass(frozen=True, slots=True)
class Capability:
    """The SDC may use the volume, by this mapping, until ``expires_unix`` (seconds since 1970)."""

    sdc_id: int
    volume_id: int
    mapping_id: int
    read_only: bool
    expires_unix: int


def sign(key: bytes, capability: Capability) -> bytes:
    """The 64 bytes that an SDC shows. Raises InvalidError when the key or a number does not fit its field."""
    if len(key) != KEY_BYTES:
        raise InvalidError(f"a capability key has {KEY_BYTES} bytes, this one has {len(key)}")
    mode = MODE_READ_ONLY if capability.read_only else MODE_READ_WRITE
    try:
        body = _BODY.pack(
            CAPABILITY_VERSION,
            mode,
            b"\0\0",
            capability.sdc_id,
            capability.volume_id,
            capability.mapping_id,
            capability.expires_unix,
        )
    except struct.error as error:
        raise InvalidError(f"a number of the capability does not fit its field: {error}") from None
    return body + _signature(key, body)


def verify(key: bytes, token: bytes, *, sdc_id: int, volume_id: int, now_unix: float) -> Capability:
    """The capability in ``token``, if it holds for this SDC and this volume now; else DeniedError with the reason.

    The signature is looked at before any field, in constant time: a forger learns nothing from which check refused it.
    """
    if len(token) != CAPABILITY_BYTES:
        raise DeniedError(f"a capability has {CAPABILITY_BYTES} bytes, this one has {len(token)}")
    body = token[: _BODY.size]
    if not hmac.compare_digest(token[_BODY.size :], _signature(key, body)):
        raise DeniedError("the capability's signature is not the MDM's")
    version, mode, zeros, sdc, volume, mapping, expires = _BODY.unpack(body)
    if version != CAPABILITY_VERSION:
        raise DeniedError(f"the capability has version {version}, not {CAPABILITY_VERSION}")
    if mode not in (MODE_READ_ONLY, MODE_READ_WRITE) or zeros != b"\0\0":
        raise DeniedError("the capability's mode is none that this version knows")
    if sdc != sdc_id:
        raise DeniedError(f"the capability is of SDC {sdc}, the connection of SDC {sdc_id}")
    if volume != volume_id:
        raise DeniedError(f"the capability is for volume {volume}, it was shown for volume {volume_id}")
    if expires <= now_unix:
        raise DeniedError("the capability has expired")
    return Capability(sdc, volume, mapping, mode == MODE_READ_ONLY, expires)


def _signature(key: bytes, body: bytes) -> bytes:
    return hmac.new(key, body, hashlib.sha256).digest()
