# Blocks that do not match their tags: found, and rewritten from the copy that has them. Shard's thread only.
from libc.stdint cimport uint32_t, uint64_t
from datapath.connection cimport Conn
from datapath.targetstate cimport Chunk, Engine, Op, Peer
from datapath.wire cimport Header

# A block of the range did not match its tag, here or for who read it: the primary looks at all copies. Nothing happens
# when that is under way already, or was found to be in vain a moment ago.
cdef void repair_want(Engine* e, Chunk* chunk, uint32_t first, uint32_t count) noexcept nogil
# Whether no copy has all blocks of the range, as was found a moment ago.
cdef bint repair_hopeless(Engine* e, const Chunk* chunk, uint32_t first, uint32_t count) noexcept nogil
# Another SDS, which has the chunk with us as its primary, says so of its copy.
cdef void repair_asked(Engine* e, Conn* c, Header* h) noexcept nogil
# A KIND_CHECK or a VERIFY whose turn has come.
cdef void check_start(Engine* e, Op* op) noexcept nogil
cdef void verify_start(Engine* e, Op* op) noexcept nogil
# A pool thread has read for one of them.
cdef void check_read(Engine* e, Op* op) noexcept nogil
# The other copy's answer to VERIFY, PULL or PUSH. 0 or a BAD_ code.
cdef int check_answer(Engine* e, Conn* c, Header* h, char* body) noexcept nogil
# A KIND_CHECK is over.
cdef void check_ended(Engine* e, Op* op) noexcept nogil
# The scrubber's next step, when one is due.
cdef void scrub_tick(Engine* e) noexcept nogil
cdef void scrub_rate(Engine* e, uint64_t bytes_per_second) noexcept nogil
