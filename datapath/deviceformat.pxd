# The files of a device: made, and checked before they are believed.
from libc.stdint cimport uint32_t, uint64_t, int64_t
from datapath.ondisk cimport Superblock

# Raises OSError for a result that is -errno.
cdef raise_errno(int64_t result, path)
# Raises DeviceFormatError unless `good`.
cdef require(bint good, file, message)
cdef bytes id_bytes(value, what)
# Reads the superblock and checks every field. True: it has rotted, this is the one before it.
cdef bint superblock_parse(Superblock* s, path, cluster_id) except -1
# Has the file with the one before and the rotten one change places: the next write goes over the rotten one.
cdef superblock_exchange(int directory_fd, path)
# Every file is there and has the size that so many slots give.
cdef check_sizes(path, uint64_t slot_count)
# Replaces the superblock file, durably: 0 or -errno. One caller at a time.
cdef int superblock_write(int directory_fd, Superblock* superblock) noexcept nogil
cdef create_device(path, bytes cluster_id, uint32_t sds_id, uint32_t index, size_bytes)
