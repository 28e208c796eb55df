# Frames to the SDSs. The engine's thread calls all of it.
from datapath.sdcstate cimport Engine, Part, Sds, Volume

# The SDS's connection has something to send when the turn ends.
cdef void send_queue(Engine* e, Sds* s) noexcept nogil
# Queues the part's frame on the SDS's connection and puts the part in flight. 0, or <0 when memory is short.
cdef int send_part(Engine* e, Part* p, Sds* s) noexcept nogil
# The same for a frame with the volume's capability.
cdef int send_capability(Engine* e, Volume* v, Sds* s) noexcept nogil
# Says that what the SDS served for this read did not match its check values; nobody waits for the answer.
cdef void send_doubt(Engine* e, Part* p, Sds* s) noexcept nogil
