# What the SDS engine does with a frame, a finished job, a lost connection. Shard's thread only.
from libc.stdint cimport uint32_t, uint64_t
from datapath.connection cimport Buf, Conn
from datapath.targetstate cimport Chunk, Engine, Op
from datapath.wire cimport Header

cdef enum EventKind:
    EV_CAPABILITY = 1
    EV_MAP_MISS = 2
    EV_CLIENT_CLOSED = 3
    EV_PEER_CLOSED = 4
    EV_PEER_SYNCED = 5
    EV_DEVICE_FAILED = 6
    EV_CHECKPOINT = 7
    EV_VERIFIED = 8
    EV_PURGED = 9
    EV_NO_SPACE = 10
    EV_REPAIR = 11
    EV_VOLUMES = 12
    EV_LEAVING = 13
    EV_PEER_SILENT = 14
    EV_LEARNED = 15
    EV_LEARNER_LOST = 16
    EV_LOST = 17
    EV_COPY_REFUSED = 18
    EV_REPAIRED = 19
    EV_SCRUBBED = 20
    EV_CORRUPTED = 21
    EV_GONE = 22
    EV_SURE = 23

cdef void emit(Engine* e, uint32_t kind, uint32_t a, uint64_t b, uint64_t c, uint64_t d, const void* data,
               uint64_t size) noexcept nogil
cdef Conn* conn_by_id(Engine* e, uint32_t id) noexcept nogil
cdef void mark_dirty(Engine* e, Conn* c) noexcept nogil
# Seals a header and queues it on the connection; what belongs to the frame is queued at once after it.
cdef void send_head(Engine* e, Conn* c, Header* h) noexcept nogil
cdef void send_body(Engine* e, Conn* c, const void* data, uint32_t size) noexcept nogil
# The same from memory of `owner`, without copying.
cdef void send_ref(Engine* e, Conn* c, Buf* owner, const char* data, uint32_t size) noexcept nogil
cdef void reply_to(Engine* e, uint32_t conn_id, const Header* request, uint32_t status, uint64_t seq) noexcept nogil
cdef void reply_head(Engine* e, Header* r, const Header* request, uint32_t status) noexcept nogil
cdef void map_miss(Engine* e, uint64_t volume_id, uint32_t segment) noexcept nogil
cdef Op* op_new(Engine* e) noexcept nogil
# The request id under which a write goes to another SDS (bit 63 is targetlearn's).
cdef inline uint64_t replication_id(const Op* op) noexcept nogil:
    return <uint64_t>(op.serial & 0x7fffffff) << 32 | op.slot_of_op
# Whether the volume's writes are acknowledged only from both disks.
cdef bint volume_commit(Engine* e, uint64_t volume_id) noexcept nogil
# ST_OK when an operation that has waited may still be carried out: who sent it is there and allowed to, the chunk is
# ours to serve.
cdef uint32_t still_status(Engine* e, Op* op) noexcept nogil
# Queues the operation in its chunk, and starts it when nothing overlaps.
cdef void op_enter(Engine* e, Op* op, Chunk* chunk, uint32_t offset, uint32_t length) noexcept nogil
cdef void op_settle(Engine* e, Op* op, uint32_t bit, uint32_t status) noexcept nogil
cdef void chunk_continue(Engine* e, Chunk* chunk) noexcept nogil
# Sends a client's operation, or that it has to be on disk, to the secondary (False: there is none) and to a learner.
cdef bint replicate(Engine* e, Op* op) noexcept nogil
cdef void forward(Engine* e, Op* op) noexcept nogil
# Applies an operation that the other copy has confirmed first.
cdef void apply(Engine* e, Op* op) noexcept nogil
# Answers a finished operation and starts what waited for it.
cdef void op_finish(Engine* e, Op* op) noexcept nogil
# Goes on with an operation whose intent is on disk.
cdef void journaled(Engine* e, Op* op) noexcept nogil
