"""A few threads for what may block on a disk (see iopool.pxd). The mutex is taken once per job, never per cached IO."""

from libc.errno cimport EAGAIN, errno
from libc.stdint cimport uint64_t
from libc.string cimport memset
from posix.unistd cimport close, read, write
from datapath.waiting cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd, pfvol_short_slice

cdef extern from "<pthread.h>" nogil:
    int pthread_create(pthread_t* thread, const void* attributes, void* (*start)(void*) noexcept nogil, void* argument)
    int pthread_join(pthread_t thread, void** result)
    int pthread_mutex_init(pthread_mutex_t* mutex, const void* attributes)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)
    int pthread_mutex_destroy(pthread_mutex_t* mutex)
    int pthread_cond_init(pthread_cond_t* cond, const void* attributes)
    int pthread_cond_wait(pthread_cond_t* cond, pthread_mutex_t* mutex)
    int pthread_cond_signal(pthread_cond_t* cond)
    int pthread_cond_broadcast(pthread_cond_t* cond)
    int pthread_cond_destroy(pthread_cond_t* cond)


cdef inline void append(Job** head, Job** tail, Job* job) noexcept nogil:
    job.next = NULL
    if head[0] == NULL:
        head[0] = job
    else:
        tail[0].next = job
    tail[0] = job


cdef inline Job* shift(Job** head) noexcept nogil:
    cdef Job* job = head[0]
    if job != NULL:
        head[0] = job.next
    return job


cdef void* work(void* argument) noexcept nogil:
    cdef IoPool* p = <IoPool*>argument
    cdef Job* job
    cdef bint urgent
    cdef uint64_t one = 1
    pfvol_short_slice()
    pthread_mutex_lock(&p.mutex)
    while True:
        job = NULL
        urgent = False
        if p.long_count == 0 and p.thread_count > 1:       # else what never ends could keep it waiting for ever
            job = shift(&p.queue_head)
        if job == NULL:
            job = shift(&p.urgent_head)
            urgent = job != NULL
        if job == NULL and (p.long_count < (p.thread_count + 1) // 2 or p.stopping):
            job = shift(&p.queue_head)
        if job == NULL:
            if p.stopping:
                break
            pthread_cond_wait(&p.cond, &p.mutex)
            continue
        p.long_count += not urgent
        pthread_mutex_unlock(&p.mutex)
        job.run(job)
        pthread_mutex_lock(&p.mutex)
        p.long_count -= not urgent
        append(&p.done_head, &p.done_tail, job)
        pthread_mutex_unlock(&p.mutex)
        write(p.event_fd, &one, sizeof(one))
        pthread_mutex_lock(&p.mutex)
    pthread_mutex_unlock(&p.mutex)
    return NULL


cdef int iopool_start(IoPool* p, uint32_t threads) noexcept nogil:
    memset(p, 0, sizeof(IoPool))
    p.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    if p.event_fd < 0:
        return -errno
    pthread_mutex_init(&p.mutex, NULL)
    pthread_cond_init(&p.cond, NULL)
    p.running = True
    while p.thread_count < threads and p.thread_count < IO_THREADS_MAX:
        if pthread_create(&p.threads[p.thread_count], NULL, work, p) != 0:
            break
        p.thread_count += 1
    return 0 if p.thread_count else -EAGAIN


cdef void iopool_stop(IoPool* p) noexcept nogil:
    """Idempotent: a descriptor closed twice would by then be another's, a device's file for instance."""
    cdef uint32_t i
    if not p.running:
        return
    p.running = False
    pthread_mutex_lock(&p.mutex)
    p.stopping = True
    pthread_cond_broadcast(&p.cond)
    pthread_mutex_unlock(&p.mutex)
    for i in range(p.thread_count):
        pthread_join(p.threads[i], NULL)
    p.thread_count = 0
    pthread_cond_destroy(&p.cond)
    pthread_mutex_destroy(&p.mutex)
    close(p.event_fd)
    p.event_fd = -1


cdef void iopool_submit(IoPool* p, Job* job, bint urgent) noexcept nogil:
    pthread_mutex_lock(&p.mutex)
    if urgent:
        append(&p.urgent_head, &p.urgent_tail, job)
    else:
        append(&p.queue_head, &p.queue_tail, job)
    pthread_cond_signal(&p.cond)
    pthread_mutex_unlock(&p.mutex)


cdef Job* iopool_take(IoPool* p) noexcept nogil:
    cdef Job* jobs
    cdef uint64_t count
    read(p.event_fd, &count, sizeof(count))
    pthread_mutex_lock(&p.mutex)
    jobs = p.done_head
    p.done_head = NULL
    p.done_tail = NULL
    pthread_mutex_unlock(&p.mutex)
    return jobs
