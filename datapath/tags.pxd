# Tags: who wrote a block, and what its bytes must be. Pure functions on struct Tag.
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from datapath.ondisk cimport Tag, TAG_HOLE, TAG_UNKNOWN, SEQ_MASK

cdef uint32_t tag_fold(uint32_t epoch, uint64_t seq) noexcept nogil
# Writes the tag of a block whose check value is `check`; seq carries its flags.
cdef void tag_set(Tag* tag, uint32_t check, uint32_t epoch, uint64_t seq) noexcept nogil
# The block's check value, as it travels on the wire.
cdef uint32_t tag_check(const Tag* tag) noexcept nogil
# The tag of a block never written: (0, TAG_HOLE), check of zeros.
cdef void tag_set_never(Tag* tag, uint64_t volume_id, uint32_t chunk_index, uint32_t block) noexcept nogil
# Compares 1024 blocks with 1024 tags: fills bad[128] (one bit a block) and returns the count of bad ones.
cdef int tags_verify(const Tag* tags, uint64_t volume_id, uint32_t chunk_index, const char* data,
                     uint8_t* bad) noexcept nogil

# Whether it says that the block is a hole, and its check value is that of zeros: a flag alone vouches for nothing.
cdef bint tag_good_hole(const Tag* tag, uint64_t volume_id, uint32_t chunk_index, uint32_t block) noexcept nogil

# The tag of a block of which it is not known what it was: unknown, and under a name that no write has.
cdef void tag_set_lost(Tag* tag, uint64_t volume_id, uint32_t chunk_index, uint32_t block) noexcept nogil

cdef inline bint tag_is_lost(const Tag* tag) noexcept nogil:
    return tag.epoch == 0 and (tag.seq & SEQ_MASK) == 1

cdef inline bint tag_newer(uint32_t epoch, uint64_t seq, const Tag* than) noexcept nogil:
    """(epoch, seq) names a later write than the tag; flags do not count."""
    if epoch != than.epoch:
        return epoch > than.epoch
    return (seq & SEQ_MASK) > (than.seq & SEQ_MASK)

cdef inline bint tag_is_hole(const Tag* tag) noexcept nogil:
    return (tag.seq & TAG_HOLE) != 0

cdef inline bint tag_is_blank(const Tag* tag) noexcept nogil:
    """All zeros: no tag was ever written here."""
    return tag.check == 0 and tag.epoch == 0 and tag.seq == 0

cdef inline bint tag_is_unknown(const Tag* tag) noexcept nogil:
    return (tag.seq & TAG_UNKNOWN) != 0 or tag_is_blank(tag)
