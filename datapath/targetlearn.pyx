"""Learners (see targetlearn.pxd)."""

from libc.stdint cimport uint32_t, uint64_t
from datapath.targetengine cimport op_settle
from datapath.targetstate cimport *
from datapath.wire cimport BAD_OPCODE


cdef void learn_begin(Engine* e) noexcept nogil:
    pass


cdef void learn_tick(Engine* e) noexcept nogil:
    pass


cdef void learn_rate(Engine* e, uint32_t pool_id, uint64_t bytes_per_second) noexcept nogil:
    pass


cdef int learn_answer(Engine* e, Conn* c, Header* h, char* body) noexcept nogil:
    return BAD_OPCODE


cdef void learner_confirmed(Engine* e, Op* op, uint32_t status) noexcept nogil:
    op_settle(e, op, PENDING_LEARNER, 0)


cdef void learn_lost(Engine* e, uint32_t sds_id) noexcept nogil:
    pass
