"""The calls that the engine's disk IO is made of, and what is injected into them on purpose (see disk.pxd).

Owns the process's filters: per call an error with the share of the calls that it strikes, and a delay of all of them.
They are set by Python's thread and read by any other: each figure is atomic, and a call that meets two of different
settings is as if it had come a moment earlier or later. Promises: without a filter a call is libc's; an injected error
never does what the call would have done; ENOSPC strikes only calls that may need room on the disk.
"""

from libc.errno cimport EAGAIN, EINTR, ENOSPC, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.time cimport nanosleep, timespec
from posix.types cimport off_t
from posix.uio cimport RWF_NOWAIT, iovec, preadv2
from posix.unistd cimport fdatasync, pread, pwrite

cdef extern from "<fcntl.h>" nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <linux/falloc.h>
    extern int fallocate(int, int, off_t, off_t);
    extern int sync_file_range(int, off_t, off_t, unsigned int);
    #define SYNC_FILE_RANGE_ALL 7    /* wait before, write, wait after; glibc has it with _GNU_SOURCE only */
    #define pfvol_get(place) __atomic_load_n(place, __ATOMIC_RELAXED)
    #define pfvol_put(place, value) __atomic_store_n(place, value, __ATOMIC_RELAXED)
    #define pfvol_count(place) __atomic_add_fetch(place, 1, __ATOMIC_RELAXED)
    #define pfvol_unlikely(condition) __builtin_expect(!!(condition), 0)
    """
    int fallocate(int fd, int mode, off_t offset, off_t size)
    int sync_file_range(int fd, off_t offset, off_t size, unsigned int flags)
    unsigned int SYNC_FILE_RANGE_ALL
    int FALLOC_FL_KEEP_SIZE
    int FALLOC_FL_PUNCH_HOLE
    uint64_t pfvol_get(const uint64_t* place)
    void pfvol_put(uint64_t* place, uint64_t value)
    uint64_t pfvol_count(uint64_t* place)
    bint pfvol_unlikely(bint condition)

cdef enum:
    CALL_PREAD = 0
    CALL_PWRITE = 1
    CALL_FDATASYNC = 2
    CALL_FALLOCATE = 3
    CALL_COUNT = 4
    MILLION = 1000000

CALLS = ("pread", "pwrite", "fdatasync", "fallocate")

cdef struct Filter:
    uint64_t error                   # errno of the calls that are struck
    uint64_t per_million             # of the calls are
    uint64_t delay_ns                # all of them wait that long first
    uint64_t failed                  # since the process started
    uint64_t delayed

cdef Filter filters[CALL_COUNT]
cdef uint64_t armed                  # whether any filter is set
cdef uint64_t turns                  # calls that have met a filter with a share


cdef uint64_t scattered(uint64_t x) noexcept nogil:
    """A number that looks random for each count (splitmix64)."""
    x += <uint64_t>0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * <uint64_t>0x94D049BB133111EB
    return x ^ (x >> 31)


cdef void wait_ns(uint64_t delay_ns) noexcept nogil:
    cdef timespec left
    left.tv_sec = <int64_t>(delay_ns // 1000000000)
    left.tv_nsec = <int64_t>(delay_ns % 1000000000)
    while nanosleep(&left, &left) < 0 and errno == EINTR:
        pass


cdef bint struck(int call, bint needs_room) noexcept nogil:
    """Waits as long as the filter says; True with errno set when the call is to fail."""
    cdef Filter* f = &filters[call]
    cdef uint64_t error = pfvol_get(&f.error), share = pfvol_get(&f.per_million), delay_ns = pfvol_get(&f.delay_ns)
    if delay_ns:
        pfvol_count(&f.delayed)
        wait_ns(delay_ns)
    if error == 0 or (error == ENOSPC and not needs_room):
        return False
    if share < MILLION and scattered(pfvol_count(&turns)) % MILLION >= share:
        return False
    pfvol_count(&f.failed)
    (&errno)[0] = <int>error
    return True


cdef ssize_t disk_pread(int fd, void* data, size_t size, int64_t offset) noexcept nogil:
    if pfvol_unlikely(pfvol_get(&armed) != 0) and struck(CALL_PREAD, False):
        return -1
    return pread(fd, data, size, offset)


cdef ssize_t disk_pread_cached(int fd, void* data, size_t size, int64_t offset) noexcept nogil:
    cdef iovec iov
    if pfvol_unlikely(pfvol_get(&armed) != 0) and (
            pfvol_get(&filters[CALL_PREAD].error) or pfvol_get(&filters[CALL_PREAD].delay_ns)):
        (&errno)[0] = EAGAIN
        return -1
    iov.iov_base = data
    iov.iov_len = size
    return preadv2(fd, &iov, 1, offset, RWF_NOWAIT)


cdef ssize_t disk_pwrite(int fd, const void* data, size_t size, int64_t offset) noexcept nogil:
    if pfvol_unlikely(pfvol_get(&armed) != 0) and struck(CALL_PWRITE, False):
        return -1
    return pwrite(fd, data, size, offset)


cdef ssize_t disk_pwrite_new(int fd, const void* data, size_t size, int64_t offset) noexcept nogil:
    if pfvol_unlikely(pfvol_get(&armed) != 0) and struck(CALL_PWRITE, True):
        return -1
    return pwrite(fd, data, size, offset)


cdef int disk_reserve(int fd, int64_t offset, int64_t size) noexcept nogil:
    if pfvol_unlikely(pfvol_get(&armed) != 0) and struck(CALL_FALLOCATE, True):
        return -1
    return fallocate(fd, 0, offset, size)


cdef int disk_punch(int fd, int64_t offset, int64_t size) noexcept nogil:
    if pfvol_unlikely(pfvol_get(&armed) != 0) and struck(CALL_FALLOCATE, False):
        return -1
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)


cdef int disk_fdatasync(int fd) noexcept nogil:
    if pfvol_unlikely(pfvol_get(&armed) != 0) and struck(CALL_FDATASYNC, False):
        return -1
    return fdatasync(fd)


cdef int disk_sync_pages(int fd) noexcept nogil:
    if pfvol_unlikely(pfvol_get(&armed) != 0) and struck(CALL_FDATASYNC, False):
        return -1
    return sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_ALL)


cdef Filter* filter_of(call) except NULL:
    if call not in CALLS:
        raise ValueError(f"{call!r} is none of {', '.join(CALLS)}")
    return &filters[<int>CALLS.index(call)]


cdef void arm() noexcept nogil:
    cdef uint64_t any_set = 0
    cdef uint32_t i
    for i in range(<uint32_t>CALL_COUNT):
        any_set |= filters[i].error | filters[i].delay_ns
    pfvol_put(&armed, any_set != 0)


def inject_error(call, int error, int per_million):
    cdef Filter* f = filter_of(call)
    if error <= 0 or not 1 <= per_million <= MILLION:
        raise ValueError(f"errno {error} for {per_million} of a million calls")
    pfvol_put(&f.error, 0)
    pfvol_put(&f.per_million, <uint64_t>per_million)
    pfvol_put(&f.error, <uint64_t>error)
    arm()


def inject_delay(call, uint64_t delay_ns):
    pfvol_put(&filter_of(call).delay_ns, delay_ns)
    arm()


def clear():
    cdef uint32_t i
    for i in range(<uint32_t>CALL_COUNT):
        pfvol_put(&filters[i].error, 0)
        pfvol_put(&filters[i].delay_ns, 0)
    arm()


def injected():
    return {name: (pfvol_get(&filters[i].failed), pfvol_get(&filters[i].delayed)) for i, name in enumerate(CALLS)}
