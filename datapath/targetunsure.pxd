# When rot has taken from a device who is in its slots (superblock.unsure): a chunk without a slot may have had one.
# Shard's thread.
from libc.stdint cimport uint32_t, uint64_t
from datapath.targetstate cimport Chunk, Engine
from datapath.volumemap cimport MapEntry

# For a chunk that is missing (chunk_missing) and of which the map makes us a member: has it compared with the other
# copy, and says what a client hears meanwhile: NOT_READY, or IO_ERROR when nobody can tell what it held.
cdef uint32_t missing_status(Engine* e, uint64_t volume_id, uint32_t index, const MapEntry* entry) noexcept nogil
# The secondary lacks the whole chunk, and we lead it.
cdef void missing_there(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil
# The other copy does not know either.
cdef void missing_both(Engine* e, Chunk* chunk) noexcept nogil
# Writes (volume, chunk) of all that are missing of those shared with this SDS (`found` NULL: only counts). How many.
cdef uint32_t missing_with(Engine* e, uint32_t sds_id, uint64_t* found) noexcept nogil
# Looks for chunks that are missing; when there are none left the devices are sure again. At each tick while unsure.
cdef void unsure_tick(Engine* e) noexcept nogil
