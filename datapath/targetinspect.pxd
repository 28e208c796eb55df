# A chunk looked at, or damaged, for an operator. On the shard's thread, which the disk holds up meanwhile.
from libc.stdint cimport uint32_t, uint64_t
from datapath.targetstate cimport Engine

# Compares the stored blocks with their tags: EV_VERIFIED.
cdef void verify(Engine* e, uint64_t token, uint64_t volume_id, uint32_t index) noexcept nogil
# Has the blocks of the chunk compared with their tags and with the other copy, and the bad ones rewritten.
cdef void repair(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil
# Flips bytes of a stored block and leaves its tag alone, as a disk that rots does: EV_CORRUPTED.
cdef void corrupt(Engine* e, uint64_t token, uint64_t volume_id, uint32_t index, uint32_t block) noexcept nogil
