"""Goal: a capability is worth exactly what the MDM signed: to this SDC, for this volume, in this mode, until then."""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import replace

import pytest

from pfvol.capability import CAPABILITY_BYTES, Capability, sign, verify
from pfvol.errors import DeniedError, InvalidError

KEY = bytes(range(32))
GOOD = Capability(sdc_id=7, volume_id=9, mapping_id=11, read_only=False, expires_unix=2000)


def resigned(body: bytes) -> bytes:
    return body + hmac.new(KEY, body, hashlib.sha256).digest()


@pytest.mark.parametrize("read_only", [False, True])
def test_what_was_signed_comes_back(read_only: bool) -> None:
    signed = replace(GOOD, read_only=read_only)
    assert verify(KEY, sign(KEY, signed), sdc_id=7, volume_id=9, now_unix=1999) == signed


def test_the_layout_is_the_documented_one() -> None:
    body = struct.pack("<BBHIQQQ", 1, 2, 0, 7, 9, 11, 2000)
    assert sign(KEY, GOOD) == resigned(body)


def test_every_flipped_bit_is_refused() -> None:
    token = sign(KEY, GOOD)
    for position in range(8 * CAPABILITY_BYTES):
        forged = bytearray(token)
        forged[position // 8] ^= 1 << position % 8
        with pytest.raises(DeniedError, match="signature"):
            verify(KEY, bytes(forged), sdc_id=7, volume_id=9, now_unix=0)


@pytest.mark.parametrize("token", [b"", b"x", bytes(CAPABILITY_BYTES - 1), bytes(CAPABILITY_BYTES + 1), bytes(65536)])
def test_another_size_is_refused(token: bytes) -> None:
    with pytest.raises(DeniedError, match="bytes"):
        verify(KEY, token, sdc_id=7, volume_id=9, now_unix=0)


def test_another_key_is_refused() -> None:
    with pytest.raises(DeniedError, match="signature"):
        verify(bytes(32), sign(KEY, GOOD), sdc_id=7, volume_id=9, now_unix=0)


def test_another_sdc_another_volume_and_a_late_one_are_refused() -> None:
    token = sign(KEY, GOOD)
    for sdc_id, volume_id, now, reason in ((8, 9, 0, "SDC 7"), (7, 10, 0, "volume 9"), (7, 9, 2000, "expired")):
        with pytest.raises(DeniedError, match=reason):
            verify(KEY, token, sdc_id=sdc_id, volume_id=volume_id, now_unix=now)


@pytest.mark.parametrize("body", [(2, 2, 0), (1, 0, 0), (1, 3, 0), (1, 2, 1)])
def test_fields_that_this_version_does_not_know_are_refused_even_when_signed(body: tuple[int, int, int]) -> None:
    token = resigned(struct.pack("<BBHIQQQ", *body, 7, 9, 11, 2000))
    with pytest.raises(DeniedError, match=r"version|mode"):
        verify(KEY, token, sdc_id=7, volume_id=9, now_unix=0)


def test_a_number_or_key_that_does_not_fit_is_refused_when_signing() -> None:
    with pytest.raises(InvalidError, match="field"):
        sign(KEY, replace(GOOD, sdc_id=2**32))
    with pytest.raises(InvalidError, match="32 bytes"):
        sign(b"", GOOD)
