# A few threads for what may block on a disk: cold reads, journal commits, syncs. Jobs are embedded in their owner's
# structs; `run` is called on a pool thread, the finished job comes back to the shard's thread through iopool_take.
# What a client waits for and is short (urgent) comes first, and always finds threads that do nothing else: of the rest
# at most half of them do something, and at least one as long as there is something.
from libc.stdint cimport uint32_t

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

cdef enum:
    IO_THREADS_MAX = 16

cdef struct Job:
    void (*run)(Job*) noexcept nogil
    Job* next
    void* owner
    int kind
    int result

cdef struct IoPool:
    pthread_mutex_t mutex
    pthread_cond_t cond
    Job* urgent_head
    Job* urgent_tail
    Job* queue_head
    Job* queue_tail
    uint32_t long_count              # threads that do something that is not urgent
    Job* done_head
    Job* done_tail
    int event_fd                     # readable when iopool_take has something
    bint running                     # between iopool_start and iopool_stop
    bint stopping
    uint32_t thread_count
    pthread_t threads[16]

cdef int iopool_start(IoPool* p, uint32_t threads) noexcept nogil
# Waits for what is queued, then joins. Does nothing if the pool does not run.
cdef void iopool_stop(IoPool* p) noexcept nogil
cdef void iopool_submit(IoPool* p, Job* job, bint urgent) noexcept nogil
# All finished jobs, linked by `next`, oldest first.
cdef Job* iopool_take(IoPool* p) noexcept nogil
