"""crc32c and block checks, against crcmod and in every implementation that this machine has."""

import random

import crcmod.predefined
import pytest

from datapath import checksum

reference = crcmod.predefined.mkCrcFun("crc-32c")


@pytest.fixture(params=checksum.implementations())
def implementation(request):
    checksum.use(request.param)
    yield request.param
    checksum.use()


def prefix(volume_id, chunk_index, block):
    return volume_id.to_bytes(8, "little") + chunk_index.to_bytes(4, "little") + block.to_bytes(4, "little")


def test_the_published_check_value(implementation):
    assert checksum.crc32c(b"123456789") == 0xE3069283


def test_the_portable_one_is_always_there():
    assert checksum.implementations()[0] == "portable"
    with pytest.raises(ValueError, match="is not in list"):
        checksum.use("none of them")


@pytest.mark.parametrize(
    "size", [0, 1, 7, 8, 9, 15, 255, 256, 257, 511, 512, 1023, 1360, 4079, 4080, 4081, 4096, 8160, 65536, 1048576]
)
def test_every_length_where_the_code_takes_another_turn(implementation, size):
    data = random.Random(size).randbytes(size)
    assert checksum.crc32c(data) == reference(data)
    assert checksum.crc32c(data, 0x12345678) == reference(data, 0x12345678)


@pytest.mark.parametrize("shift", range(9))
def test_any_alignment(implementation, shift):
    data = memoryview(random.Random(shift).randbytes(5000))[shift:]
    assert checksum.crc32c(data) == reference(bytes(data))


def test_a_block_check_covers_where_the_block_belongs(implementation):
    data = random.Random(1).randbytes(4096)
    right = checksum.block_check(7, 8, 9, data)
    assert right == reference(prefix(7, 8, 9) + data)
    assert len({right, *(checksum.block_check(*place, data) for place in [(6, 8, 9), (7, 9, 9), (7, 8, 8)])}) == 4


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 3), (2**64 - 1, 2**32 - 1, 1023)])
def test_the_check_of_a_zero_block_needs_no_zeros(place):
    assert checksum.check_zero_block(*place) == reference(prefix(*place) + bytes(4096))


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 4096), (0, 1), (4095, 2), (512, 4096), (4096, 12288), (1000, 1048576)]
)
def test_a_range_has_one_check_for_each_block_it_touches(implementation, offset, length):
    data = random.Random(length).randbytes(length)
    checks = checksum.range_checks(3, 4, offset, data)
    expected, at = [], 0
    while at < length:
        block, inside = divmod(offset + at, 4096)
        piece = data[at : at + 4096 - inside]
        expected.append(reference(prefix(3, 4, block) + piece))
        at += len(piece)
    assert checks == expected
    assert checksum.range_mismatch(3, 4, offset, data, checks) == -1


def test_a_mismatch_names_the_first_wrong_block():
    data = bytearray(random.Random(2).randbytes(5 * 4096))
    checks = checksum.range_checks(1, 1, 100, data)
    data[3 * 4096] ^= 1
    data[4 * 4096] ^= 1
    assert checksum.range_mismatch(1, 1, 100, data, checks) == 3
    with pytest.raises(ValueError, match="6 check values are due"):
        checksum.range_mismatch(1, 1, 100, data, checks[:-1])
