# crc32c (Castagnoli), in the zlib convention: crc32c(crc32c(0, a), b) == crc32c(0, a + b).
#
# The check value of a block is the crc32c of a 16-byte prefix (volume u64, chunk u32, block u32) followed by the
# block's bytes, so that a block that lands in the wrong place never verifies. For a block that a request covers only
# in part (an unaligned edge) it is the crc32c of the same prefix and the bytes that are sent.
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stddef cimport size_t

cdef uint32_t crc32c(uint32_t crc, const void* data, size_t size) noexcept nogil
# crc32c of the 16-byte prefix: the start value of a block's check.
cdef uint32_t block_seed(uint64_t volume_id, uint32_t chunk_index, uint32_t block) noexcept nogil
# Check values of every block that [offset, offset + length) of a chunk touches, partial edges included.
cdef void check_range(uint64_t volume_id, uint32_t chunk_index, uint32_t offset, uint32_t length,
                      const void* data, uint32_t* checks_out) noexcept nogil
# -1 when all match, else the index (0..) of the first block that does not.
cdef int verify_range(uint64_t volume_id, uint32_t chunk_index, uint32_t offset, uint32_t length,
                      const void* data, const uint32_t* checks) noexcept nogil
# The check value of a block of 4096 zero bytes, without touching memory (linear algebra over GF(2)).
cdef uint32_t check_zero_block(uint64_t volume_id, uint32_t chunk_index, uint32_t block) noexcept nogil
