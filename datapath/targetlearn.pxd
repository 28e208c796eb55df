# Learners: how an SDS that is to become a member gets what it lacks. The primary drives. Shard's thread only.
from libc.stdint cimport uint32_t, uint64_t
from datapath.connection cimport Conn
from datapath.targetstate cimport Engine, Op
from datapath.wire cimport Header

# Every tick: chunks whose learner is here begin to learn.
cdef void learn_begin(Engine* e) noexcept nogil
# Every turn of the loop: goes on copying, as far as the rates allow.
cdef void learn_tick(Engine* e) noexcept nogil
# The limit of a pool in bytes per second, 0: nothing is copied.
cdef void learn_rate(Engine* e, uint32_t pool_id, uint64_t bytes_per_second) noexcept nogil
# An answer with a request id of this module, on a connection that we made. 0 or a BAD_ code.
cdef int learn_answer(Engine* e, Conn* c, Header* h, char* body) noexcept nogil
# The learner has answered a write that was forwarded to it.
cdef void learner_confirmed(Engine* e, Op* op, uint32_t status) noexcept nogil
# The connection to this SDS is gone.
cdef void learn_lost(Engine* e, uint32_t sds_id) noexcept nogil
