# The seam between the engine and the host's disks: the calls that read, write and sync what is on a device, each as in
# libc (-1 and errno), and the filter in front of them that makes them fail or wait on purpose. A filter is of the
# process, which runs one SDS. While nothing is injected a call costs one predictable branch more. Any thread.
#
# The mapped tag table and the names in a device's directory go past the seam: what it has to show is how the engine
# takes what a disk may answer to any of these.
from libc.stdint cimport int64_t

cdef ssize_t disk_pread(int fd, void* data, size_t size, int64_t offset) noexcept nogil
# From the page cache at once, or -1: whoever asked goes to a thread that may wait. So does all that is filtered.
cdef ssize_t disk_pread_cached(int fd, void* data, size_t size, int64_t offset) noexcept nogil
# To a place that was promised room when the device was made, or when its slot was given out (tags, journal).
cdef ssize_t disk_pwrite(int fd, const void* data, size_t size, int64_t offset) noexcept nogil
# To a place that may need room: a full disk says ENOSPC here, and to disk_reserve.
cdef ssize_t disk_pwrite_new(int fd, const void* data, size_t size, int64_t offset) noexcept nogil
cdef int disk_reserve(int fd, int64_t offset, int64_t size) noexcept nogil
cdef int disk_punch(int fd, int64_t offset, int64_t size) noexcept nogil
cdef int disk_fdatasync(int fd) noexcept nogil
# Writes the file's dirty pages and waits (sync_file_range): a sync to who injects.
cdef int disk_sync_pages(int fd) noexcept nogil
