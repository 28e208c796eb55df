"""crc32c holds for any bytes, cut anywhere, at any alignment, whatever computes it."""

import crcmod.predefined
from hypothesis import given, settings
from hypothesis import strategies as st

from datapath import checksum, tags

reference = crcmod.predefined.mkCrcFun("crc-32c")
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@settings(max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 40), st.integers(0, 15), st.data())
def test_any_cut_gives_the_same(seed, repeat, shift, data):
    whole = memoryview(bytes(shift) + seed * (repeat + 1))[shift:]
    cut = data.draw(st.integers(0, len(whole)))
    try:
        for implementation in checksum.implementations():
            checksum.use(implementation)
            assert checksum.crc32c(whole) == reference(bytes(whole))
            assert checksum.crc32c(whole[cut:], checksum.crc32c(whole[:cut])) == reference(bytes(whole))
    finally:
        checksum.use()


@given(u64, u32, st.integers(0, 1023))
def test_zero_blocks(volume_id, chunk_index, block):
    expected = checksum.block_check(volume_id, chunk_index, block, bytes(4096))
    assert checksum.check_zero_block(volume_id, chunk_index, block) == expected


@given(u32, u32, u64)
def test_a_tag_gives_back_what_was_put_in(check, epoch, seq):
    assert tags.unpack(tags.pack(check, epoch, seq)) == (check, epoch, seq)


@given(u32, u32, u64, st.integers(0, 127))
def test_a_flipped_bit_of_a_tag_changes_the_check_it_asks_for(check, epoch, seq, bit):
    tag = bytearray(tags.pack(check, epoch, seq))
    tag[bit // 8] ^= 1 << bit % 8
    assert tags.unpack(tag)[0] != check


@given(u32, u64, u32, u64)
def test_newer_is_the_order_of_epoch_and_seq_without_flags(epoch, seq, other_epoch, other_seq):
    mask = (1 << 62) - 1
    expected = (epoch, seq & mask) > (other_epoch, other_seq & mask)
    assert tags.newer(epoch, seq, tags.pack(1, other_epoch, other_seq)) == expected
