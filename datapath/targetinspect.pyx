"""What an operator asks of a chunk's copy here: whether it is good, that it be good, or that it be bad.

Promises of the last: nothing else is changed than the bytes of the block that was named, which has to be written and in
use by that chunk at this moment; past the filters of datapath.disk, because whoever corrupts wants that to be done.
"""

from libc.errno cimport EIO, ENODATA, ENOENT, errno
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport pread, pwrite
from datapath.chunkstore cimport chunk_fd, chunk_find, chunk_tags
from datapath.device cimport device_offset, device_verify_slot
from datapath.ondisk cimport SLOT_NONE
from datapath.tags cimport tag_is_hole
from datapath.targetengine cimport EV_CORRUPTED, EV_VERIFIED, emit
from datapath.targetrepair cimport repair_want
from datapath.targetstate cimport *
from datapath.wire cimport BLOCK_SHIFT, BLOCK_SIZE, CHUNK_BLOCKS

cdef enum:
    TAGS_BYTES = 16384
    BAD_BYTES = 128
    SECTOR = 512                     # one byte of each is flipped


cdef void verify(Engine* e, uint64_t token, uint64_t volume_id, uint32_t index) noexcept nogil:
    cdef Chunk* c = chunk_find(e, volume_id, index)
    cdef char* answer
    if c == NULL or c.slot == SLOT_NONE:
        emit(e, EV_VERIFIED, 0, token, 0, 0, NULL, 0)
        return
    answer = <char*>calloc(1, TAGS_BYTES + BAD_BYTES)
    if answer == NULL:
        return
    if device_verify_slot(e.devices[c.device].d, volume_id, index, c.slot, e.scratch,
                          <unsigned char*>answer + TAGS_BYTES) < 0:
        memset(answer + TAGS_BYTES, 0xff, BAD_BYTES)       # not read: not one block of it is known to be good
    memcpy(answer, chunk_tags(e, c), TAGS_BYTES)
    emit(e, EV_VERIFIED, 1, token, 0, 0, answer, TAGS_BYTES + BAD_BYTES)
    free(answer)


cdef void repair(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil:
    cdef Chunk* c = chunk_find(e, volume_id, index)
    if c != NULL and c.slot != SLOT_NONE:
        repair_want(e, c, 0, CHUNK_BLOCKS)


cdef uint32_t flip(Engine* e, Chunk* c, uint32_t block) noexcept nogil:
    """0 or the errno. Nobody writes to the block meanwhile: that is this thread's work too."""
    cdef char bytes[BLOCK_SIZE]
    cdef int64_t offset = <int64_t>device_offset(c.slot) + (<int64_t>block << BLOCK_SHIFT)
    cdef ssize_t got = pread(chunk_fd(e, c), bytes, BLOCK_SIZE, offset)
    cdef uint32_t at
    if got == BLOCK_SIZE:
        for at in range(<uint32_t>(BLOCK_SIZE // SECTOR)):
            bytes[at * SECTOR] ^= 0x55
        got = pwrite(chunk_fd(e, c), bytes, BLOCK_SIZE, offset)
    if got < 0:
        return <uint32_t>errno
    return 0 if got == BLOCK_SIZE else EIO


cdef void corrupt(Engine* e, uint64_t token, uint64_t volume_id, uint32_t index, uint32_t block) noexcept nogil:
    cdef Chunk* c = chunk_find(e, volume_id, index)
    cdef uint32_t error
    if c == NULL or c.slot == SLOT_NONE:
        error = ENOENT
    elif block >= <uint32_t>CHUNK_BLOCKS or tag_is_hole(chunk_tags(e, c) + block):
        error = ENODATA
    elif e.devices[c.device].d.failed:
        error = <uint32_t>e.devices[c.device].d.failed
    else:
        e.devices[c.device].d.needs_sync = True
        error = flip(e, c, block)
    emit(e, EV_CORRUPTED, error, token, 0, 0, NULL, 0)
