# The intent journal: two halves in one file, generation g in half g % 2 (ondisk.pxd has the format).
#
# One thread appends (the shard's); any thread commits. Records are built in memory, in an image of their half, and are
# written by journal_commit in whole blocks. A half is begun again only after its generation was voided, and voiding
# (journal_commit first, under the same lock as every commit) is what makes the image safe to reuse.
from libc.stdint cimport uint8_t, uint32_t, uint64_t, int64_t
from libc.stddef cimport size_t
from datapath.ondisk cimport JournalHeader, JournalRecord

cdef extern from * nogil:
    """
    #include <pthread.h>
    #include <stdint.h>
    static inline uint64_t pfvol_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void pfvol_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    static inline int pfvol_load_int(const int *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void pfvol_store_int(int *p, int v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
    """
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)
    uint64_t pfvol_load(const uint64_t*)
    void pfvol_store(uint64_t*, uint64_t)
    int pfvol_load_int(const int*)
    void pfvol_store_int(int*, int)

cdef struct JournalHalf:
    uint64_t generation
    uint64_t first                   # what `appended` was when the generation began
    JournalRecord* image             # anonymous memory for a half's records

cdef struct Journal:
    int fd
    uint32_t incarnation
    uint64_t capacity                # records in a half
    uint64_t running                 # records that a running device may use of them
    uint64_t half_size               # bytes of a half in the file
    uint8_t device_id[16]
    uint64_t generation              # the open one; written by the shard, read by committers
    uint64_t appended                # likewise
    uint64_t durable                 # written under `lock`
    uint64_t header_durable          # under `lock`: the newest generation whose header is on disk
    JournalHalf halves[2]
    char* scratch                    # under `lock`
    pthread_mutex_t lock

cdef uint64_t journal_capacity(uint64_t slot_count) noexcept nogil
cdef uint64_t journal_half_size(uint64_t slot_count) noexcept nogil
cdef void journal_header_make(JournalHeader* header, uint64_t generation, const uint8_t* device_id) noexcept nogil
# NULL when there is no memory.
cdef Journal* journal_new(int fd, uint64_t slot_count, uint32_t incarnation, const uint8_t* device_id) noexcept nogil
cdef void journal_delete(Journal* journal) noexcept nogil

# Reads the header of a half. 1: good (*generation is set), 0: all zeros, -EBADMSG: neither, or -errno.
cdef int journal_read_header(Journal* journal, int half, uint64_t* generation) noexcept nogil
# Reads the half of a generation into its image up to the first record that is not its next one. Returns the count, or
# -errno.
cdef int64_t journal_read_records(Journal* journal, uint64_t generation, uint32_t slot_count) noexcept nogil
# Whether records of the generation that were durable are missing behind the first `count`, which were read: 1, 0 or
# -errno. What was being written when the host went down leaves no such trace.
cdef int journal_rotten(Journal* journal, uint64_t generation, uint64_t count) noexcept nogil
# Goes on in a generation that was read and has `count` records.
cdef void journal_resume(Journal* journal, uint64_t generation, uint64_t count) noexcept nogil

# Shard. The count of records after the new one, or -ENOSPC when `limit` records are in the half.
cdef int64_t journal_append(Journal* journal, uint64_t limit, uint32_t kind, uint64_t volume_id, uint32_t chunk_index,
                            uint32_t slot, uint32_t epoch) noexcept nogil
# Shard. Only after the generation before the open one was voided.
cdef uint64_t journal_begin(Journal* journal) noexcept nogil
# Any thread. 0 or -errno; after an error no further commit may be believed.
cdef int journal_commit(Journal* journal) noexcept nogil
# The same, with journal.lock held.
cdef int journal_commit_locked(Journal* journal) noexcept nogil

# Whole reads and writes at an offset: 0, or -errno (-EIO for a file that ends too early).
cdef int write_all(int fd, const void* data, size_t size, uint64_t offset) noexcept nogil
cdef int read_all(int fd, void* data, size_t size, uint64_t offset) noexcept nogil
cdef bint is_blank(const void* data, size_t size) noexcept nogil
