# Requests: from a FUSE message, submit() or the load generator to parts, and from the parts' ends to one answer. The
# engine's thread calls all of it.
from libc.stdint cimport uint32_t, uint64_t
from datapath.fusechannel cimport FuseIo
from datapath.sdcstate cimport Engine, Part, Request, Volume
from datapath.wire cimport Header

# Starts a request whose volume, kind, offset, length, source, unique and (for a write) buffer and data are filled in.
# It is freed when it has been answered, which may be at once.
cdef void request_start(Engine* e, Request* r) noexcept nogil
cdef void request_from_fuse(void* context, FuseIo* io) noexcept nogil
cdef void request_part_done(Engine* e, Part* p, int error, int reason, const Header* h, char* body) noexcept nogil
# For what makes the parts itself: a part of a request; all of them given up; the answer, with no part left.
cdef void request_link(Engine* e, Request* r, Part* p) noexcept nogil
cdef void request_cancel(Engine* e, Request* r) noexcept nogil
cdef void request_finish(Engine* e, Request* r) noexcept nogil
# Answers every request of a volume (NULL: of all) with an error now.
cdef void requests_fail(Engine* e, Volume* v, int error, int reason) noexcept nogil
# Requests past their deadline get EIO; throttled ones go on as far as their limits allow.
cdef void requests_run_deadlines(Engine* e) noexcept nogil
cdef void requests_run_throttled(Engine* e) noexcept nogil
# The load generator: `depth` requests at a time until end_ns. e.bench is filled in.
cdef void bench_start(Engine* e, uint32_t depth) noexcept nogil
