# Learners: how an SDS that is to become a member gets what it lacks. The primary drives. Shard's thread only.
from libc.stdint cimport uint32_t, uint64_t
from datapath.connection cimport Conn
from datapath.targetstate cimport Chunk, Engine, Op, Peer
from datapath.wire cimport Header

cdef extern from *:
    """
    #define PFVOL_LEARN_REQUEST (1ULL << 63)
    """
    const uint64_t LEARN_REQUEST "PFVOL_LEARN_REQUEST"    # in the request ids of this module

cdef enum:
    LEARN_WAIT_MS = 50               # the loop sleeps no longer than this

# Every tick: chunks whose learner is here begin to learn.
cdef void learn_begin(Engine* e) noexcept nogil
# Every turn of the loop: goes on copying, as far as the rates allow, and says how long the loop may sleep.
cdef void learn_tick(Engine* e) noexcept nogil
# The limit of a pool in bytes per second, 0: nothing is copied.
cdef void learn_rate(Engine* e, uint32_t pool_id, uint64_t bytes_per_second) noexcept nogil
# An answer with a request id of this module, on a connection that we made. 0 or a BAD_ code.
cdef int learn_answer(Engine* e, Conn* c, Header* h, char* body) noexcept nogil
# The learner, which is no member yet, has answered a write that was forwarded to it.
cdef void learner_confirmed(Engine* e, Op* op, uint32_t status) noexcept nogil
# The connection to this SDS is gone.
cdef void learn_lost(Engine* e, uint32_t sds_id) noexcept nogil
# The learner may lack something of the chunk, or have more: it learns anew, or is given up when it counts as a member.
cdef void learn_stop(Engine* e, Chunk* chunk) noexcept nogil
# The map has changed, or the volume is gone: nothing is left of the chunk's learning.
cdef void learn_forget(Engine* e, Chunk* chunk) noexcept nogil
# A KIND_COPY operation: its turn has come; a pool thread has read for it.
cdef void copy_start(Engine* e, Op* op) noexcept nogil
cdef void copy_read(Engine* e, Op* op) noexcept nogil
# At the end of the engine.
cdef void learn_free(Peer* p) noexcept nogil
