"""crc32c, and the check values of blocks: see checksum.pxd for what they cover.

The instruction set is chosen when the module is imported (AVX-512 with carry-less multiplication, SSE4.2, ARMv8 CRC,
else tables). Every C function may be called from any thread and touches only what it is given. The Python functions
are for tests and offline tools.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stddef cimport size_t
from libc.string cimport memcpy

cdef extern from "crc32c.h" nogil:
    ctypedef uint32_t (*pfvol_crc_function)(uint32_t, const uint8_t*, size_t) noexcept nogil
    ctypedef struct pfvol_crc_way:
        const char* name
        pfvol_crc_function run
    pfvol_crc_way pfvol_crc_ways[3]
    int pfvol_crc_way_count
    pfvol_crc_function pfvol_crc_run
    uint32_t pfvol_crc_zero[4][256]
    void pfvol_crc_init()
    uint32_t pfvol_crc_apply(uint32_t (*table)[256], uint32_t state)

cdef enum:
    BLOCK_SIZE = 4096

pfvol_crc_init()


cdef uint32_t crc32c(uint32_t crc, const void* data, size_t size) noexcept nogil:
    return ~pfvol_crc_run(~crc, <const uint8_t*>data, size)


cdef uint32_t block_seed(uint64_t volume_id, uint32_t chunk_index, uint32_t block) noexcept nogil:
    cdef uint8_t prefix[16]
    memcpy(prefix, &volume_id, 8)
    memcpy(prefix + 8, &chunk_index, 4)
    memcpy(prefix + 12, &block, 4)
    return crc32c(0, prefix, 16)


cdef void check_range(uint64_t volume_id, uint32_t chunk_index, uint32_t offset, uint32_t length,
                      const void* data, uint32_t* checks_out) noexcept nogil:
    cdef const uint8_t* at = <const uint8_t*>data
    cdef uint32_t index = 0
    cdef uint32_t size
    while length:
        size = min(length, BLOCK_SIZE - offset % BLOCK_SIZE)
        checks_out[index] = crc32c(block_seed(volume_id, chunk_index, offset // BLOCK_SIZE), at, size)
        index += 1
        at += size
        offset += size
        length -= size


cdef int verify_range(uint64_t volume_id, uint32_t chunk_index, uint32_t offset, uint32_t length,
                      const void* data, const uint32_t* checks) noexcept nogil:
    cdef const uint8_t* at = <const uint8_t*>data
    cdef int index = 0
    cdef uint32_t size
    while length:
        size = min(length, BLOCK_SIZE - offset % BLOCK_SIZE)
        if checks[index] != crc32c(block_seed(volume_id, chunk_index, offset // BLOCK_SIZE), at, size):
            return index
        index += 1
        at += size
        offset += size
        length -= size
    return -1


cdef uint32_t check_zero_block(uint64_t volume_id, uint32_t chunk_index, uint32_t block) noexcept nogil:
    return ~pfvol_crc_apply(pfvol_crc_zero, ~block_seed(volume_id, chunk_index, block))


def py_crc32c(const uint8_t[::1] data, uint32_t crc=0):
    """crc32c of ``data``, continuing from ``crc`` (zlib's convention)."""
    cdef size_t size = data.shape[0]
    cdef const uint8_t* at = &data[0] if size else NULL
    with nogil:
        crc = crc32c(crc, at, size)
    return crc


def block_check(uint64_t volume_id, uint32_t chunk_index, uint32_t block, const uint8_t[::1] data):
    """The check value of a block, or of the part of it that ``data`` is."""
    cdef size_t size = data.shape[0]
    return crc32c(block_seed(volume_id, chunk_index, block), &data[0] if size else NULL, size)


def py_check_zero_block(uint64_t volume_id, uint32_t chunk_index, uint32_t block):
    """The check value of a block of zeros, computed without the zeros."""
    return check_zero_block(volume_id, chunk_index, block)


def range_checks(uint64_t volume_id, uint32_t chunk_index, uint32_t offset, const uint8_t[::1] data):
    """The check values of every block that ``data``, at ``offset`` bytes in the chunk, touches."""
    cdef uint32_t length = data.shape[0]
    cdef uint32_t count = (offset % BLOCK_SIZE + length + BLOCK_SIZE - 1) // BLOCK_SIZE if length else 0
    out = bytearray(4 * count)
    cdef uint8_t[::1] view = out
    if count:
        check_range(volume_id, chunk_index, offset, length, &data[0], <uint32_t*>&view[0])
    return memoryview(out).cast("I").tolist()


def range_mismatch(uint64_t volume_id, uint32_t chunk_index, uint32_t offset, const uint8_t[::1] data, checks):
    """-1 when ``data`` matches ``checks``, else the position in it of the first value that does not."""
    cdef uint32_t length = data.shape[0]
    cdef uint32_t count = (offset % BLOCK_SIZE + length + BLOCK_SIZE - 1) // BLOCK_SIZE if length else 0
    if len(checks) != count:
        raise ValueError(f"{count} check values are due, {len(checks)} were given")
    if not count:
        return -1
    packed = bytearray(b"".join(int(check).to_bytes(4, "little") for check in checks))
    cdef uint8_t[::1] view = packed
    return verify_range(volume_id, chunk_index, offset, length, &data[0], <const uint32_t*>&view[0])


def implementations():
    """The names of what can compute here, the best last: ``portable``, and of ``sse4.2``, ``avx512``, ``armv8``."""
    return [(<bytes>pfvol_crc_ways[i].name).decode() for i in range(pfvol_crc_way_count)]


def use(name=None):
    """For tests: compute with this one of them, or with the best there is, in this process."""
    global pfvol_crc_run
    known = implementations()
    pfvol_crc_run = pfvol_crc_ways[known.index(name) if name is not None else len(known) - 1].run


# Under the names of the C functions, which Cython does not let a Python function share.
globals().update(crc32c=py_crc32c, check_zero_block=py_check_zero_block)
