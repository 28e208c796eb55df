# What the SDS engine knows of volumes. Shard's thread only.
from libc.stdint cimport int64_t, uint64_t
from datapath.ring cimport Message
from datapath.targetstate cimport Engine, TargetVolume

# The volume's entry, made when there is none. NULL when memory or room is short.
cdef TargetVolume* volume_get(Engine* e, uint64_t volume_id) noexcept nogil
# The segment of the map (-1: all of them) is known now, or will never be: it may be asked for again.
cdef void misses_answered(Engine* e, uint64_t volume_id, int64_t segment) noexcept nogil
# The command that brings a segment of a map.
cdef void segment(Engine* e, Message* m) noexcept nogil
# Gives back what purged volumes hold, as far as the journal has room; the next tick goes on.
cdef void purge(Engine* e) noexcept nogil
# Lets volumes that were dropped and have nothing here be purged after a while.
cdef void forget_dropped(Engine* e) noexcept nogil
# Tells Python what each volume holds here.
cdef void volume_report(Engine* e) noexcept nogil
