# The mailbox between a trio program and an engine's thread: two rings of fixed-size messages, an eventfd each.
# One producer, one consumer a ring: commands (trio -> engine), events (engine -> trio). No Python object crosses it;
# `data` is malloc'ed by the producer and freed by the consumer.
from libc.stdint cimport uint32_t, uint64_t

cdef struct Message:
    uint32_t kind
    uint32_t a
    uint64_t b
    uint64_t c
    uint64_t d
    char* data
    uint64_t size

cdef struct Ring:
    Message* slots
    uint32_t capacity                # a power of two
    uint32_t head                    # next to read, owned by the consumer
    uint32_t tail                    # next to write, owned by the producer
    int event_fd
    Message* overflow                # producer's own queue for what did not fit
    uint32_t overflow_count
    uint32_t overflow_capacity

cdef int ring_init(Ring* r, uint32_t capacity) noexcept nogil
cdef void ring_destroy(Ring* r) noexcept nogil
# Never blocks and never loses: what does not fit waits in the producer's overflow until ring_retry. -ENOMEM only when
# memory is gone.
cdef int ring_push(Ring* r, const Message* m) noexcept nogil
# Moves overflowed messages into the ring when there is room (producer). Returns how many still wait.
cdef uint32_t ring_retry(Ring* r) noexcept nogil
# 1 and a message, or 0 (consumer).
cdef bint ring_pop(Ring* r, Message* m) noexcept nogil
# Empties the eventfd (consumer, before it pops).
cdef void ring_clear(Ring* r) noexcept nogil
