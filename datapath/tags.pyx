"""Tags: struct Tag as a value. Pure; any thread, on memory that the caller owns.

A Python tag is ``(check, epoch, seq)`` with the check value as it travels on the wire and seq with its flags.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from datapath.checksum cimport block_seed, check_zero_block, crc32c
from datapath.ondisk cimport Tag, TAG_HOLE, TAG_SIZE, TAG_UNKNOWN, TAGS_PER_SLOT

cdef enum:
    BLOCK_SIZE = 4096

HOLE = TAG_HOLE
UNKNOWN = TAG_UNKNOWN


cdef uint32_t tag_fold(uint32_t epoch, uint64_t seq) noexcept nogil:
    cdef uint8_t name[12]
    memcpy(name, &epoch, 4)
    memcpy(name + 4, &seq, 8)
    return crc32c(0, name, 12)


cdef void tag_set(Tag* tag, uint32_t check, uint32_t epoch, uint64_t seq) noexcept nogil:
    tag.check = check ^ tag_fold(epoch, seq)
    tag.epoch = epoch
    tag.seq = seq


cdef uint32_t tag_check(const Tag* tag) noexcept nogil:
    return tag.check ^ tag_fold(tag.epoch, tag.seq)


cdef void tag_set_never(Tag* tag, uint64_t volume_id, uint32_t chunk_index, uint32_t block) noexcept nogil:
    tag_set(tag, check_zero_block(volume_id, chunk_index, block), 0, TAG_HOLE)


cdef void tag_set_lost(Tag* tag, uint64_t volume_id, uint32_t chunk_index, uint32_t block) noexcept nogil:
    tag_set(tag, check_zero_block(volume_id, chunk_index, block), 0, 1 | TAG_UNKNOWN)


cdef bint tag_good_hole(const Tag* tag, uint64_t volume_id, uint32_t chunk_index, uint32_t block) noexcept nogil:
    return (tag.seq & (TAG_HOLE | TAG_UNKNOWN)) == TAG_HOLE and tag_check(tag) == check_zero_block(
        volume_id, chunk_index, block)


cdef int tags_verify(const Tag* tags, uint64_t volume_id, uint32_t chunk_index, const char* data,
                     uint8_t* bad) noexcept nogil:
    cdef uint32_t block, check
    cdef int count = 0
    cdef Tag tag
    memset(bad, 0, TAGS_PER_SLOT // 8)
    for block in range(<uint32_t>TAGS_PER_SLOT):
        tag = tags[block]
        check = crc32c(block_seed(volume_id, chunk_index, block), data + <size_t>block * BLOCK_SIZE, BLOCK_SIZE)
        if tag_is_blank(&tag) or check != tag_check(&tag):
            bad[block >> 3] |= 1 << (block & 7)
            count += 1
    return count


def pack(uint32_t check, uint32_t epoch, uint64_t seq):
    """The 16 bytes of a tag."""
    cdef Tag tag
    tag_set(&tag, check, epoch, seq)
    return (<const char*>&tag)[:TAG_SIZE]


def unpack(const uint8_t[::1] data):
    """``(check, epoch, seq)`` of 16 bytes."""
    cdef Tag tag
    if data.shape[0] != TAG_SIZE:
        raise ValueError(f"a tag has {TAG_SIZE} bytes, not {data.shape[0]}")
    memcpy(&tag, &data[0], TAG_SIZE)
    return tag_check(&tag), tag.epoch, tag.seq


def never(uint64_t volume_id, uint32_t chunk_index, uint32_t block):
    """The 16 bytes of the tag of a block that was never written."""
    cdef Tag tag
    tag_set_never(&tag, volume_id, chunk_index, block)
    return (<const char*>&tag)[:TAG_SIZE]


def newer(uint32_t epoch, uint64_t seq, const uint8_t[::1] than):
    """Whether ``(epoch, seq)`` names a later write than the tag of 16 bytes."""
    cdef Tag tag
    if than.shape[0] != TAG_SIZE:
        raise ValueError(f"a tag has {TAG_SIZE} bytes, not {than.shape[0]}")
    memcpy(&tag, &than[0], TAG_SIZE)
    return bool(tag_newer(epoch, seq, &tag))
