# Journal commits, syncs and checkpoints of an SDS's devices. Shard's thread only, but for the pool jobs.
from libc.stdint cimport uint32_t
from datapath.iopool cimport Job
from datapath.targetstate cimport DeviceState, Engine, Op

# Makes what was appended to the device's journal durable; then the operations in its list go on.
cdef void commit_start(Engine* e, DeviceState* ds) noexcept nogil
# Has the kernel begin to write a stream of large writes out, so that the sync which usually ends it finds little left.
cdef void writeback_note(Engine* e, DeviceState* ds, uint32_t size) noexcept nogil
# Adds the operation to the next sync of its chunk's device (PENDING_SYNC).
cdef void sync_wait(Engine* e, Op* op) noexcept nogil
# Goes on with a FLUSH: to the next device that has something to sync, else to its answer.
cdef void flush_next(Engine* e, Op* op) noexcept nogil
cdef void checkpoint_start(Engine* e) noexcept nogil
# Tells Python once that the device is out of service, when it is.
cdef void device_failed(Engine* e, DeviceState* ds) noexcept nogil
# After the shard's thread has ended.
cdef void last_checkpoint(Engine* e) noexcept nogil
# A finished pool job of this module.
cdef void durability_done(Engine* e, Job* job) noexcept nogil
