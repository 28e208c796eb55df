# The SDC engine as Python holds it: the state, and the thread that owns it between start and stop.
from libc.stdint cimport uint32_t, uint64_t
from datapath.sdcstate cimport Engine

cdef class Initiator:
    cdef Engine engine
    cdef object _thread
    cdef bint _started
    cdef bint _stopped
    cdef _command(self, uint32_t kind, uint32_t a=*, uint64_t b=*, uint64_t c=*, uint64_t d=*, bytes data=*)
