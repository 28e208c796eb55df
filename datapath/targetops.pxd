# Operations that are known, answered and not carried out again; and how the other copies of a chunk hear of them.
from libc.stdint cimport uint32_t
from datapath.connection cimport Conn
from datapath.targetstate cimport Chunk, Engine, Op
from datapath.wire cimport Header

# Answers a client's operation that has been carried out, or is not to be any more. False: it is new.
cdef bint op_known(Engine* e, Op* op) noexcept nogil
# It has been applied here.
cdef void op_note(Engine* e, Op* op) noexcept nogil
# What was applied is gone again, and nobody was told of it.
cdef void op_undo(Engine* e, Op* op) noexcept nogil
# The copy of the chunk here is about to be replaced: what was applied to it does not count.
cdef void ops_forget(Engine* e, Chunk* chunk) noexcept nogil
# Tells another SDS, which has all of the chunk's data by now, what has been carried out in it.
cdef void ops_tell(Engine* e, Conn* c, const Chunk* chunk) noexcept nogil
# Tells it so of all chunks that it leads, or has from us, and that need no comparing.
cdef void ops_tell_all(Engine* e, Conn* c) noexcept nogil
# The primary tells us.
cdef void ops_told(Engine* e, const Header* h) noexcept nogil
# The secondary tells us, who have restarted.
cdef void ops_told_back(Engine* e, Conn* c, const Header* h) noexcept nogil
# What it has told us of chunks that have not been compared since is given up: it may have restarted too.
cdef void ops_forget_told(Engine* e, uint32_t sds_id) noexcept nogil
