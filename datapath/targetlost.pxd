# Chunks whose copy here is lost to its disk, and copies of others that cannot take part: who goes out, and what clients
# hear until then. Shard's thread only.
from libc.stdint cimport uint32_t, uint64_t
from datapath.connection cimport Conn
from datapath.targetstate cimport Chunk, Engine, Sync

# Whether the chunk's device is out of service here, or none is left that could take it.
cdef bint device_lost(Engine* e, const Chunk* chunk) noexcept nogil
# The same, or a part of the copy cannot be read or written.
cdef bint chunk_lost(Engine* e, const Chunk* chunk) noexcept nogil
# What a client hears of a chunk that this SDS cannot serve for its disk: NOT_READY when there is another member, which
# is going to serve alone, else IO_ERROR.
cdef uint32_t lost_status(Engine* e, Chunk* chunk) noexcept nogil
# A block could not be read though its device is in service: as lost_status, and the other member is to go on alone.
cdef uint32_t block_lost(Engine* e, Chunk* chunk) noexcept nogil
# Whether all that was written here is on disks now, as far as this SDS still counts; of one volume, or (0) of what it
# keeps for this primary.
cdef uint32_t flush_status(Engine* e, uint64_t volume_id, uint32_t asker) noexcept nogil
# The chunk's agreement over this connection has failed. Who is the cause of it for long goes out of the set.
cdef void agreement_failed(Engine* e, Conn* c, Chunk* chunk, const Sync* s) noexcept nogil
# Once the cause is found: has the secondary left out of the chunk, again each second until the map says so.
cdef void ask_alone(Engine* e, Conn* c, Chunk* chunk) noexcept nogil
# Tells Python what is lost here and may be given over to its other member. At each tick while there is any.
cdef void lost_tell(Engine* e) noexcept nogil
