# The chunks an SDS holds: the table, slots and intents, applying and reading whole blocks. Shard's thread only.
from libc.stdint cimport uint32_t, uint64_t
from datapath.ondisk cimport SLOT_NONE, Tag
from datapath.targetstate cimport Chunk, Engine

cdef Chunk* chunk_find(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil
cdef Chunk* chunk_get(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil
# Frees what is known of a chunk that is not here, when nobody works on it: `c` is not to be used after it.
cdef void chunk_forget(Engine* e, Chunk* c) noexcept nogil
# Gives the chunk a slot when it has none. 0, -ENOSPC, -EAGAIN (a checkpoint has to end first), another errno.
cdef int chunk_allocate(Engine* e, Chunk* c, uint32_t epoch) noexcept nogil
# Appends the chunk's intent to the open generation when it is not there; c.mark says when it is durable. 0 or -errno.
cdef int chunk_intent(Engine* e, Chunk* c) noexcept nogil
cdef bint chunk_durable(Engine* e, Chunk* c) noexcept nogil
# Writes whole blocks under one (epoch, seq): bytes first, then tags. 0 or -errno.
cdef int chunk_write(Engine* e, Chunk* c, uint32_t first, uint32_t count, const char* data, const uint32_t* checks,
                     uint32_t epoch, uint64_t seq) noexcept nogil
# The same under a tag each, none a hole.
cdef int chunk_put(Engine* e, Chunk* c, uint32_t first, uint32_t count, const char* data,
                   const Tag* names) noexcept nogil
cdef int chunk_discard(Engine* e, Chunk* c, uint32_t first, uint32_t count, uint32_t epoch, uint64_t seq) noexcept nogil
# Counts the blocks that are not holes anew.
cdef void chunk_count_live(Engine* e, Chunk* c) noexcept nogil
# Gives the slot back when nothing lives in it and nobody works on it. `refused`: because the other copy has no room.
cdef void chunk_trim(Engine* e, Chunk* c, bint refused) noexcept nogil
# Gives the chunk's slot back, whatever is in it; on a failed device it is only forgotten. False: the journal is full,
# try again after a checkpoint.
cdef bint chunk_release(Engine* e, Chunk* c) noexcept nogil
# Whether it is not known what of the chunk (NULL: of one that is not known here) was here: see targetunsure.
cdef inline bint chunk_missing(const Engine* e, const Chunk* c) noexcept nogil:
    return e.unsure and (c == NULL or (c.slot == <uint32_t>SLOT_NONE and not c.certain))

cdef Tag* chunk_tags(Engine* e, Chunk* c) noexcept nogil
cdef int chunk_fd(Engine* e, Chunk* c) noexcept nogil
