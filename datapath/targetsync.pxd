# Frames in, and how a pair comes to agree again after a lost connection or a crash. Shard's thread only.
from libc.stdint cimport uint32_t, uint64_t
from datapath.connection cimport Buf, Conn
from datapath.targetstate cimport Chunk, Engine
from datapath.wire cimport Header

cdef int on_frame(void* context, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil
cdef uint32_t grant_status(Engine* e, Conn* c, uint64_t volume_id, bint write) noexcept nogil
# The chunk may differ from its other copy: it serves nothing until sync_continue has settled it.
cdef void unsync(Engine* e, Chunk* c) noexcept nogil
# An outgoing peer is there: asks what it may have missed.
cdef void sync_begin(Engine* e, Conn* c) noexcept nogil
# Goes on with the next chunk that may differ, for every peer that is ready.
cdef void sync_continue(Engine* e) noexcept nogil
# The outgoing connection is gone: what the peer has not confirmed may differ.
cdef void peer_lost(Engine* e, Conn* c) noexcept nogil
