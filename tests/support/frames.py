"""Frames packed by hand from docs/internals/wire.md: what the product's own packing is compared with."""

from __future__ import annotations

import struct

import crcmod.predefined

crc32c = crcmod.predefined.mkCrcFun("crc-32c")

HEADER = struct.Struct("<4sBBHIIQQIIIIIIQQQ")
CHUNK, BLOCK, MIB = 4 * 1024 * 1024, 4096, 1024 * 1024
FIELDS = (
    "magic", "version", "opcode", "status", "flags", "crc", "request_id", "volume_id", "chunk_index", "offset",
    "length", "body_length", "epoch", "node_id", "seq", "op_id", "incarnation",
)  # fmt: skip
REPLY = 128


def header(opcode: int, **fields: int | bytes) -> bytes:
    """80 bytes with the crc that belongs to them, unless ``crc`` is given."""
    values = dict.fromkeys(FIELDS, 0) | {"magic": b"PFV1", "version": 1, "opcode": opcode} | fields
    if "crc" not in fields:
        values["crc"] = crc32c(HEADER.pack(*values.values()))
    return HEADER.pack(*values.values())


def blocks(offset: int, length: int) -> int:
    return (offset + length + BLOCK - 1) // BLOCK - offset // BLOCK


def legal_headers() -> dict[str, tuple[int, dict[str, int]]]:
    """One or more of each opcode, requests and answers: name -> (opcode, fields)."""
    top = CHUNK - BLOCK
    whole = {"offset": 3 * BLOCK, "length": 2 * BLOCK}
    legal: dict[str, tuple[int, dict[str, int]]] = {
        "hello": (1, {"body_length": 72}),
        "challenge": (2, {"body_length": 104}),
        "proof": (3, {"body_length": 32}),
        "welcome": (4, {}),
        "welcome that refuses": (4, {"status": 14}),
        "capability": (16, {"body_length": 64}),
        "read": (17, whole),
        "read of the last block": (17, {"offset": top, "length": BLOCK}),
        "read of an unaligned megabyte's blocks": (17, {"length": MIB + BLOCK}),
        "write": (18, {**whole, "body_length": 2 * 4 + 2 * BLOCK}),
        "write of one byte": (18, {"offset": CHUNK - 1, "length": 1, "body_length": 4 + 1}),
        "write over a block's edge": (18, {"offset": BLOCK - 1, "length": 2, "body_length": 2 * 4 + 2}),
        "write of an unaligned megabyte": (18, {"offset": 1, "length": MIB, "body_length": 257 * 4 + MIB}),
        "write to disk": (18, {**whole, "flags": 4, "body_length": 2 * 4 + 2 * BLOCK}),
        "discard": (19, whole),
        "discard of a chunk": (19, {"length": CHUNK}),
        "flush": (20, {}),
        "seek": (21, {}),
        "replicate": (32, {**whole, "body_length": 2 * 4 + 2 * BLOCK}),
        "replicate discard": (33, whole),
        "dirty": (34, {}),
        "dirty, a later page": (34, {"offset": 2**32 - 1}),
        "tags": (35, {}),
        "pull": (36, whole),
        "push": (37, {**whole, "flags": 8, "body_length": 2 * 20 + 2 * BLOCK}),
        "ping": (38, {"flags": 8}),
        "verify": (39, whole),
        "repair": (40, whole),
        "read again": (17, {**whole, "flags": 8}),
        "read, answered": (17 | REPLY, {**whole, "body_length": 2 * 4 + 2 * BLOCK}),
        "read, answered with zeros": (17 | REPLY, {**whole, "flags": 1}),
        "seek, answered": (21 | REPLY, {"body_length": 128}),
        "seek, answered absent": (21 | REPLY, {"flags": 2}),
        "dirty, answered": (34 | REPLY, {"body_length": 3 * 16, "flags": 16}),
        "dirty, answered with all it can": (34 | REPLY, {"body_length": 65536}),
        "tags, answered": (35 | REPLY, {"body_length": 16384}),
        "tags, answered absent": (35 | REPLY, {"flags": 2}),
        "pull, answered": (36 | REPLY, {**whole, "body_length": 2 * 20 + 2 * BLOCK}),
        "pull, answered absent": (36 | REPLY, {**whole, "flags": 2}),
        "verify, answered": (39 | REPLY, {**whole, "body_length": 2 * 16}),
        "verify, answered absent": (39 | REPLY, {**whole, "flags": 2}),
    }
    for opcode in (16, 18, 19, 20, 32, 33, 37, 38, 40):
        legal[f"{opcode}, answered"] = (opcode | REPLY, {})
    for opcode in (16, 17, 18, 19, 20, 21, 32, 33, 34, 35, 36, 37, 38, 39, 40):
        legal[f"{opcode}, refused"] = (opcode | REPLY, {"status": 8, "length": 0 if opcode == 34 else BLOCK})
    return legal
