# The Python object that owns an open device. The target borrows the Device while it runs.
from libc.stdint cimport uint32_t
from datapath.device cimport Device

cdef class BlockDevice:
    cdef Device* device
    cdef readonly object path
    cdef bint was_clean
    cdef bint restored
    cdef dict __dict__
    cdef lock(self)
    cdef map_files(self)
    cdef rise(self, bytes boot_id)
    cdef prepare(self)
    cdef release(self)
    cdef Device* opened(self) except NULL
    cdef Device* used_slot(self, uint32_t slot, uint32_t block=*) except NULL
    cdef collect_vacant(self)
