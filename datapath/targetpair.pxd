# How a pair of SDSs comes to agree again after a lost connection or a crash. Shard's thread only.
from libc.stdint cimport uint32_t, uint64_t
from datapath.connection cimport Conn
from datapath.ondisk cimport Tag
from datapath.targetstate cimport Chunk, Engine, Session
from datapath.wire cimport Header

cdef enum:
    PULL_BLOCKS_MAX = 64             # per frame: 256 KiB

# The chunk may differ from its other copy: it serves nothing until sync_continue has settled it.
cdef void unsync(Engine* e, Chunk* c) noexcept nogil
# The same, for now only because somebody else says so, who will say it again should this process end.
cdef void unsync_told(Engine* e, Chunk* c) noexcept nogil
# It does not differ, or there is nothing of it to agree about.
cdef void agreed(Engine* e, Chunk* c) noexcept nogil
# An outgoing peer is there: asks what it may have missed.
cdef void sync_begin(Engine* e, Conn* c) noexcept nogil
# Goes on with the next chunk that may differ, for every peer that is ready.
cdef void sync_continue(Engine* e) noexcept nogil
# The outgoing connection is gone: what the peer has not confirmed may differ.
cdef void peer_lost(Engine* e, Conn* c) noexcept nogil
# A frame on an outgoing peer connection: the answer to what this SDS asked as primary. 0 or a BAD_ code.
cdef int secondary_answer(Engine* e, Conn* c, Header* h, char* body) noexcept nogil
# The head of a PUSH; check values, tags and bytes of its blocks come after it.
cdef void push_head(Engine* e, Conn* c, uint64_t request_id, const Chunk* chunk, uint32_t first, uint32_t count,
                    const Tag* tags) noexcept nogil
# The epoch of the chunk's entry as known here: of two slots of a chunk the one given out in the newer epoch counts.
cdef uint32_t epoch_of(Engine* e, Chunk* chunk) noexcept nogil
# A frame without a body to another SDS.
cdef void ask(Engine* e, Conn* c, int opcode, uint64_t volume_id, uint32_t index, uint32_t offset, uint32_t length,
              uint32_t flags) noexcept nogil

cdef inline bint peer_ready(const Conn* c) noexcept nogil:
    """The connection to another SDS stands, and the two have told each other what may differ."""
    return c != NULL and not c.closing and (<Session*>c.user).ready
