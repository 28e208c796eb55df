# Reads at the SDS. Shard's thread only, but for the pool job.
from datapath.connection cimport Conn
from datapath.targetstate cimport Chunk, Engine, Op
from datapath.wire cimport Header

# Answers an admitted READ, now or when what it overlaps has ended.
cdef void read_answer(Engine* e, Conn* c, Header* h, Chunk* chunk) noexcept nogil
# Goes on with a read that had its turn: a pool thread reads, read_done answers.
cdef void read_start(Engine* e, Op* op) noexcept nogil
cdef void read_done(Engine* e, Op* op) noexcept nogil
