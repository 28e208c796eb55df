# What changes for a chunk when its set does. Shard's thread only.
from libc.stdint cimport uint32_t, uint64_t
from datapath.targetstate cimport Chunk, Engine, Op, Peer
from datapath.volumemap cimport MapEntry

# The chunk's place in the map, NULL when it is not known here.
cdef const MapEntry* entry_of(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil
# Whether the chunk may be served as far as its set goes: leases, agreement, who left. `entry` names us as a member.
cdef bint members_ready(Engine* e, const MapEntry* entry, uint64_t volume_id, uint32_t index,
                        const Chunk* chunk) noexcept nogil
# Whether whoever was last taken out of the set serves no more; we lead the chunk.
cdef bint passed(Engine* e, const MapEntry* entry, uint64_t volume_id, uint32_t index) noexcept nogil
# The same without telling anybody, earlier members that left included; `chunk` may be NULL.
cdef bint opened(Engine* e, const MapEntry* entry, const Chunk* chunk) noexcept nogil
# A newer entry has come (`old` is all zeros when there was none); `version`: a map version that has it.
cdef void entry_changed(Engine* e, uint64_t volume_id, uint32_t index, const MapEntry* old, const MapEntry* entry,
                        uint64_t version) noexcept nogil
# Acknowledges what waited for members that are out, as far as their gates are open.
cdef void release_gated(Engine* e) noexcept nogil
# Tells Python which chunks may lack something here. The peer's connections have been closed.
cdef void tell_leaving(Engine* e, Peer* p) noexcept nogil
# Gives back what the map says is not ours; the next tick goes on.
cdef void discard_strays(Engine* e) noexcept nogil
