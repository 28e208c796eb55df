"""Goal: a header that passes is safe to index with, and every field that is wrong is refused for its own reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath import wire
from tests.support.frames import BLOCK, CHUNK, MIB, REPLY, blocks, header, legal_headers

MAGIC, VERSION, CRC, OPCODE, STATUS, FLAGS, RANGE, LENGTH, BODY, ALIGNMENT, COUNT = range(1, 12)
LEGAL = legal_headers()
ANY = {
    "request_id": 2**64 - 1,
    "volume_id": 2**63 + 5,
    "chunk_index": 2**32 - 1,
    "epoch": 2**32 - 2,
    "node_id": 77,
    "seq": 2**62,
    "op_id": 12345678901,
    "incarnation": 3,
}


def refusal(data: bytes) -> int:
    with pytest.raises(wire.BadFrameError) as caught:
        wire.unpack_header(data)
    assert str(caught.value)
    return caught.value.code


@pytest.mark.parametrize(("opcode", "fields"), LEGAL.values(), ids=LEGAL.keys())
def test_each_legal_header_is_packed_as_documented_and_taken_back(opcode: int, fields: dict[str, int]) -> None:
    packed = wire.pack_header(opcode, **(ANY | fields))
    assert packed == header(opcode, **(ANY | fields))
    got = wire.unpack_header(packed)
    assert got == {
        "opcode": opcode,
        "status": 0,
        "flags": 0,
        "offset": 0,
        "length": 0,
        "body_length": 0,
        **ANY,
        **fields,
    }


@pytest.mark.parametrize(("opcode", "fields"), LEGAL.values(), ids=LEGAL.keys())
def test_a_flipped_bit_anywhere_is_refused(opcode: int, fields: dict[str, int]) -> None:
    good = wire.pack_header(opcode, **(ANY | fields))
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        assert refusal(bytes(bad)) == (MAGIC if bit < 32 else VERSION if bit < 40 else CRC)


@pytest.mark.parametrize("size", [0, 1, 79, 81, 160])
def test_a_header_has_80_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="80 bytes"):
        wire.unpack_header(bytes(size))


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        (MAGIC, header(17, length=BLOCK, magic=b"PFV2")),
        (VERSION, header(17, length=BLOCK, version=0)),
        (VERSION, header(17, length=BLOCK, version=2)),
        (CRC, header(17, length=BLOCK, crc=0)),
        (FLAGS, header(17, length=BLOCK, flags=32)),
        (FLAGS, header(17, length=BLOCK, flags=1 << 31)),
        (STATUS, header(17, length=BLOCK, status=1)),
        (STATUS, header(17 | REPLY, status=16)),
        (STATUS, header(4, status=16)),
        (STATUS, header(1, status=1)),
    ],
)
def test_what_is_wrong_with_any_opcode(code: int, bad: bytes) -> None:
    assert refusal(bad) == code


def test_opcodes_that_do_not_exist_are_refused() -> None:
    requests = {opcode for opcode, _ in LEGAL.values() if opcode < REPLY}
    answers = {opcode for opcode, _ in LEGAL.values() if opcode >= REPLY}
    for opcode in range(256):
        if opcode not in requests | answers:
            assert refusal(header(opcode)) == OPCODE, opcode


@pytest.mark.parametrize("opcode", [17, 18, 19, 32, 33, 36, 37, 20, 21, 35, 38, 16, 17 | REPLY, 18 | REPLY])
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (CHUNK, BLOCK),
        (CHUNK - BLOCK, 2 * BLOCK),
        (CHUNK + BLOCK, 0),
        (0, CHUNK + BLOCK),
        (2**32 - BLOCK, BLOCK),  # their sum is 0 in 32 bits
        (BLOCK, 2**32 - BLOCK),
        (2**31, 2**31),
        (2**32 - 1, 2**32 - 1),
    ],
)
def test_a_range_that_leaves_the_chunk_is_refused(opcode: int, offset: int, length: int) -> None:
    assert refusal(header(opcode, offset=offset, length=length)) == RANGE


def with_body(opcode: int, offset: int, length: int, extra: int = 0) -> bytes:
    per_block = {18: 4, 32: 4, 37: 20, 17 | REPLY: 4, 36 | REPLY: 20}.get(opcode, 0)
    body = per_block * blocks(offset, length) + (length if per_block else 0)
    return header(opcode, offset=offset, length=length, body_length=body + extra)


@pytest.mark.parametrize("opcode", [18, 32, 37, 17, 36, 17 | REPLY, 36 | REPLY])
def test_data_is_neither_nothing_nor_more_than_a_frame_moves(opcode: int) -> None:
    most = MIB if opcode == 18 else MIB + BLOCK
    assert wire.unpack_header(with_body(opcode, 0, most))["length"] == most
    assert refusal(with_body(opcode, 0, 0)) == LENGTH
    assert refusal(with_body(opcode, 0, most + BLOCK)) == LENGTH
    assert refusal(with_body(opcode, 0, CHUNK)) == LENGTH


@pytest.mark.parametrize("opcode", [17, 19, 32, 33, 36, 37, 17 | REPLY, 36 | REPLY])
@pytest.mark.parametrize(("offset", "length"), [(1, BLOCK), (0, 1), (0, BLOCK + 1), (BLOCK - 1, BLOCK), (512, 512)])
def test_whole_blocks_where_they_are_due(opcode: int, offset: int, length: int) -> None:
    assert refusal(with_body(opcode, offset, length)) == ALIGNMENT


@pytest.mark.parametrize("opcode", [19, 33])
def test_a_discard_of_nothing_is_refused(opcode: int) -> None:
    assert refusal(header(opcode)) == LENGTH


@pytest.mark.parametrize(("opcode", "fields"), LEGAL.values(), ids=LEGAL.keys())
def test_a_body_of_any_other_size_is_refused(opcode: int, fields: dict[str, int]) -> None:
    size = fields.get("body_length", 0)
    bounded_only = {1, 2, 3, 4, 16}  # their bodies are checked by who reads them
    wrong = {65537, 2**31, 2**32 - 1} if opcode in bounded_only else {size + 1, abs(size - 1), size + 4, 2**32 - 1}
    for body_length in wrong - {size}:
        code = refusal(header(opcode, **(fields | {"body_length": body_length})))
        assert code == (COUNT if opcode == 34 | REPLY and not fields.get("status") else BODY), body_length


@pytest.mark.parametrize("opcode", [16, 20, 21, 35, 38, 1, 2, 3, 4])
def test_a_length_where_none_is_due_is_refused(opcode: int) -> None:
    assert refusal(header(opcode, length=BLOCK)) == BODY


def test_the_list_of_what_may_differ_pages_by_offset_and_has_no_length() -> None:
    assert refusal(header(34, length=BLOCK)) == RANGE
    assert refusal(header(34 | REPLY, length=1, body_length=16)) == RANGE
    assert refusal(header(34 | REPLY, body_length=65552)) == COUNT


FIELD = st.one_of(
    st.integers(0, 2**32 - 1),
    st.integers(-2, 2).map(lambda n: (CHUNK + n) % 2**32),
    st.integers(0, 1100).map(lambda n: n * BLOCK),
)


@given(
    st.sampled_from(sorted({opcode for opcode, _ in LEGAL.values()})),
    FIELD,
    FIELD,
    st.one_of(st.integers(0, 2**32 - 1), st.just(-1)),
    st.integers(0, 31),
    st.integers(0, 16),
)
def test_what_passes_stays_in_its_chunk_and_in_memory(
    opcode: int, offset: int, length: int, body: int, flags: int, status: int
) -> None:
    fitting = with_body(opcode, offset, length) if offset + length <= CHUNK else header(opcode)
    data = fitting if body < 0 else header(
        opcode, offset=offset, length=length, body_length=body, flags=flags, status=status if opcode & REPLY else 0
    )  # fmt: skip
    try:
        got = wire.unpack_header(data)
    except wire.BadFrameError:
        return
    assert got["body_length"] <= wire.BODY_SIZE_MAX
    if opcode & 127 != 34:
        assert got["offset"] + got["length"] <= CHUNK
    if got["body_length"] > wire.CONTROL_BODY_MAX:
        assert got["body_length"] >= got["length"] > 0


def test_many_headers_in_a_row_pass() -> None:
    assert wire.bench_headers(10_000) == 10_000
