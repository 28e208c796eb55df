# Parts on their way: which SDS gets one, what its answer means, and what happens when the SDS, the map or the
# capability is not there. The engine's thread calls all of it.
from libc.stdint cimport uint32_t, uint64_t
from datapath.sdcstate cimport Engine, Part, Sds, Volume

cdef enum LinkError:
    LINK_UNKNOWN_REQUEST = 64        # beside BadFrame: an answer to nothing that was asked
    LINK_MISMATCH = 65               # an answer that does not fit its request

# Sends the part where the map says, or lets it wait for what is missing. May end it at once (Engine.part_done).
cdef void part_route(Engine* e, Part* p) noexcept nogil
# Nobody waits for the part any more.
cdef void part_cancel(Engine* e, Part* p) noexcept nogil
# Asks trio for a connection, once.
cdef void link_need(Engine* e, Sds* s) noexcept nogil
# Takes the part out of the place where it is; has it tried again a little later; has a read ask another SDS.
cdef void part_detach(Engine* e, Part* p) noexcept nogil
cdef void part_back_off(Engine* e, Part* p) noexcept nogil
cdef void part_exclude(Part* p, Sds* s, bint for_good) noexcept nogil
# A connection for an SDS; the engine owns fd from here on.
cdef void link_attach(Engine* e, uint32_t sds_id, int fd, uint64_t durable_incarnation) noexcept nogil
# Closes the SDS's connection, if any; its parts find another way or wait. `tell`: trio is to connect again.
cdef void link_drop(Engine* e, Sds* s, int error, bint tell) noexcept nogil
cdef void link_receive(Engine* e, Sds* s) noexcept nogil
# Sends what the turn has queued, on all connections that have something.
cdef void link_flush(Engine* e) noexcept nogil
cdef void link_writable(Engine* e, Sds* s) noexcept nogil
# The volume has a new capability: presented wherever one had been.
cdef void link_capability_changed(Engine* e, Volume* v) noexcept nogil
# Parts whose time to try again has come.
cdef void link_run_backoff(Engine* e) noexcept nogil
