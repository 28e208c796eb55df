"""The data plane's frames, byte for byte: packed here from the documented fields, and kept in tests/golden/wire.json.

A difference is a change of the protocol, that is, a new WIRE_VERSION.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from pathlib import Path

import pytest

from datapath import tags, wire
from datapath.checksum import range_checks
from pfvol import capability, handshake
from tests.support.frames import crc32c, header, legal_headers

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "wire.json").read_text())
SECRET, CLUSTER, NONCE, OTHER_NONCE = bytes(range(32)), b"a cluster's id..", b"c" * 32, b"s" * 32
LEGAL = legal_headers()
PLACE = {"volume_id": 0x1122334455667788, "chunk_index": 0x99AABBCC, "offset": 4096}
WHO = {"request_id": 21, "epoch": 7, "node_id": 9, "seq": (3 << 42) | 5, "op_id": 17, "incarnation": 4}


def test_numbers_and_limits() -> None:
    assert GOLDEN["constants"] == wire.WIRE


def test_every_header_is_kept() -> None:
    assert GOLDEN["headers"].keys() == LEGAL.keys()


@pytest.mark.parametrize("name", LEGAL)
def test_headers(name: str) -> None:
    opcode, fields = LEGAL[name]
    packed = wire.pack_header(opcode, **(WHO | {"volume_id": 5, "chunk_index": 6} | fields))
    assert packed.hex() == GOLDEN["headers"][name]


def check_value(block: int, data: bytes) -> int:
    return int(crc32c(struct.pack("<QII", PLACE["volume_id"], PLACE["chunk_index"], block) + data))


def test_a_write_from_the_middle_of_a_block() -> None:
    data = bytes(range(256)) * 20
    place = PLACE | {"offset": 4096 + 100, "length": len(data)}
    checks = [check_value(1, data[:3996]), check_value(2, data[3996:])]
    assert checks == range_checks(place["volume_id"], place["chunk_index"], place["offset"], data)
    body = struct.pack("<2I", *checks) + data
    frame = wire.pack_header(wire.OP_WRITE, **(WHO | place), body_length=len(body)) + body
    assert frame == header(18, **(WHO | place), body_length=len(body)) + body
    assert frame.hex() == GOLDEN["write"]


def test_a_block_pushed_with_its_tag() -> None:
    data = bytes(range(256)) * 16
    check = check_value(1, data)
    body = struct.pack("<I", check) + tags.pack(check, 7, (3 << 42) | 5) + data
    frame = wire.pack_header(wire.OP_PUSH, **(WHO | PLACE), flags=wire.FLAG_RESYNC, length=4096, body_length=len(body))
    assert (frame + body).hex() == GOLDEN["push"]


def test_the_handshakes_bodies() -> None:
    hello = struct.pack("<B3sIQ16sI4s32s", 1, b"", 9, 4, CLUSTER, 2, b"", NONCE)
    stated = handshake.Hello(handshake.Peer(wire.ROLE_SDC, 9, 4), CLUSTER, 2, NONCE)
    assert handshake.build_hello(stated) == hello
    unproven = struct.pack("<IIQQ16s32s", 2, 1, 6, 5, CLUSTER, OTHER_NONCE)
    challenge = unproven + hmac.new(SECRET, b"pfvol server" + hello + unproven, hashlib.sha256).digest()
    info = handshake.ServerInfo(2, 6, 5)
    assert handshake.build_challenge(SECRET, hello, info, CLUSTER, OTHER_NONCE) == challenge
    proof = hmac.new(SECRET, b"pfvol client" + hello + challenge, hashlib.sha256).digest()
    assert handshake.client_proof(SECRET, hello, challenge) == proof
    assert [body.hex() for body in (hello, challenge, proof)] == GOLDEN["handshake"]


def test_a_capability() -> None:
    body = struct.pack("<BB2sIQQQ", 1, 2, b"", 9, PLACE["volume_id"], 12, 1_900_000_000)
    token = body + hmac.new(SECRET, body, hashlib.sha256).digest()
    assert capability.sign(SECRET, capability.Capability(9, PLACE["volume_id"], 12, False, 1_900_000_000)) == token
    assert token.hex() == GOLDEN["capability"]
