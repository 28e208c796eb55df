# Parts that go elsewhere than they were sent. The engine's thread calls all of it.
from libc.stdint cimport uint32_t
from datapath.sdcstate cimport Engine, Part, Volume

# The map of a segment has been set: what waited for it goes on, what is with the wrong SDS is sent again.
cdef void link_segment_changed(Engine* e, Volume* v, uint32_t segment) noexcept nogil
# What one copy does not answer is asked of the other; a flush that does not need the answer ends.
cdef void link_run_hedges(Engine* e) noexcept nogil
# The part is a flush, its SDS keeps it waiting, and the SDS's peers vouch for what it has.
cdef bint flush_spared(Engine* e, Part* p) noexcept nogil
