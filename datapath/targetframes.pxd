# Frames at the SDS, from clients, from primaries, and a secondary's answers. Shard's thread only.
from libc.stdint cimport uint32_t, uint64_t
from datapath.connection cimport Buf, Conn
from datapath.ring cimport Message
from datapath.targetstate cimport Engine, Op
from datapath.wire cimport Header

cdef int on_frame(void* context, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil
# ST_OK when the connection's SDC may use the volume now (write: also change it).
cdef uint32_t grant_status(Engine* e, Conn* c, uint64_t volume_id, bint write) noexcept nogil
# Answers a TAGS or PULL whose turn has come.
cdef void look_answer(Engine* e, Op* op) noexcept nogil
# Python's answer to a capability that was shown: a: connection, b: request, c: volume, d: expiry, size: may write + 1.
cdef void grant(Engine* e, const Message* m, uint32_t status) noexcept nogil
# From now on the SDC's sessions may no longer use the volume.
cdef void revoke(Engine* e, uint64_t volume_id, uint32_t sdc_id) noexcept nogil
