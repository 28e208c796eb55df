"""What an SDS does to make things durable: journal commits, syncs, checkpoints (see targetdurability.pxd).

Each device has at most one of each under way, on a pool thread; operations that need the next one wait in its list.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from datapath.device cimport (
    Device, device_checkpoint_begin, device_checkpoint_end, device_fail, device_intent, device_journal_appended,
    device_journal_commit, device_journal_durable, device_journal_void, device_sync, device_sync_all, device_sync_begin,
    device_writeback)
from datapath.chunkstore cimport chunk_intent, chunk_missing
from datapath.connection cimport Conn
from datapath.iopool cimport Job, iopool_submit
from datapath.ondisk cimport SLOT_NONE
from datapath.targetengine cimport EV_CHECKPOINT, EV_DEVICE_FAILED, conn_by_id, emit, journaled, op_settle
from datapath.targetlost cimport flush_status
from datapath.targetpair cimport sync_continue
from datapath.targetstate cimport *
from datapath.wire cimport ST_IO_ERROR, ST_OK

cdef enum:
    JOB_COMMIT = 101
    JOB_SYNC = 102
    JOB_CHECKPOINT = 103
    JOB_WRITEBACK = 104
    LARGE_BYTES = 131072             # a write of this size is part of a stream
    WRITEBACK_BYTES = 16777216


cdef void commit_run(Job* job) noexcept nogil:
    job.result = device_journal_commit((<DeviceState*>job.owner).d)


cdef void sync_run(Job* job) noexcept nogil:
    job.result = device_sync((<DeviceState*>job.owner).d)


cdef void checkpoint_run(Job* job) noexcept nogil:
    job.result = device_sync_all((<DeviceState*>job.owner).d)
    if job.result == 0:
        job.result = device_journal_void((<DeviceState*>job.owner).d)


cdef void submit(Engine* e, DeviceState* ds, Job* job, int kind, void (*run)(Job*) noexcept nogil) noexcept nogil:
    job.run = run
    job.owner = ds
    job.kind = kind
    iopool_submit(&e.io, job, kind == JOB_COMMIT)


cdef void commit_start(Engine* e, DeviceState* ds) noexcept nogil:
    if ds.commit_running:
        return
    ds.commit_running = True
    submit(e, ds, &ds.commit_job, JOB_COMMIT, commit_run)


cdef void device_failed(Engine* e, DeviceState* ds) noexcept nogil:
    if not ds.reported and ds.d.failed:
        ds.reported = True
        e.lost = True
        emit(e, EV_DEVICE_FAILED, ds.d.index, ds.d.failed, 0, 0, NULL, 0)


cdef void commit_done(Engine* e, DeviceState* ds) noexcept nogil:
    cdef Op* op
    cdef uint64_t durable = device_journal_durable(ds.d)
    cdef int result = ds.commit_job.result                 # operations that go on may start the next commit
    ds.commit_running = False
    e.counters.journal_commits += 1
    if result < 0:
        device_failed(e, ds)
    while ds.journal_head != NULL:
        op = ds.journal_head
        if result == 0 and op.chunk.mark > durable:
            break
        ds.journal_head = op.wait_next
        op.wait_next = NULL
        op.state = STATE_RUNNING
        if result < 0:
            op_settle(e, op, PENDING_LOCAL, ST_IO_ERROR)
        else:
            journaled(e, op)
    if ds.checkpoint == 1 and durable >= ds.checkpoint_mark and result == 0:
        checkpoint_go(e, ds)
    if ds.journal_head != NULL or (ds.checkpoint == 1 and result == 0):
        commit_start(e, ds)
    if e.intents_awaited:
        sync_continue(e)                                   # chunks that may differ wait for theirs too


cdef void writeback_run(Job* job) noexcept nogil:
    device_writeback((<DeviceState*>job.owner).d)
    job.result = 0


cdef void writeback_note(Engine* e, DeviceState* ds, uint32_t size) noexcept nogil:
    if size < LARGE_BYTES:
        return
    ds.large_bytes += size
    if ds.large_bytes < WRITEBACK_BYTES or e.writeback_running:
        return
    ds.large_bytes = 0
    e.writeback_running = True
    submit(e, ds, &ds.writeback_job, JOB_WRITEBACK, writeback_run)


cdef void sync_wait(Engine* e, Op* op) noexcept nogil:
    """Adds the operation to the next sync of its chunk's device."""
    sync_wait_on(e, op, &e.devices[op.chunk.device])


cdef void sync_wait_on(Engine* e, Op* op, DeviceState* ds) noexcept nogil:
    op.wait_next = ds.sync_next
    ds.sync_next = op
    sync_start(e, ds)


cdef void sync_start(Engine* e, DeviceState* ds) noexcept nogil:
    if ds.sync_running or ds.sync_next == NULL:
        return
    ds.sync_running = True
    ds.sync_now = ds.sync_next
    ds.sync_next = NULL
    device_sync_begin(ds.d)
    submit(e, ds, &ds.sync_job, JOB_SYNC, sync_run)


cdef void sync_done(Engine* e, DeviceState* ds) noexcept nogil:
    cdef Op* op = ds.sync_now
    cdef Op* following
    cdef int result = ds.sync_job.result                   # operations that go on may start the next sync
    ds.sync_now = NULL
    ds.sync_running = False
    if result < 0:
        device_failed(e, ds)
    while op != NULL:
        following = op.wait_next
        op.wait_next = NULL
        if op.kind == KIND_FLUSH:
            flush_next(e, op)
        else:
            op_settle(e, op, PENDING_SYNC, ST_IO_ERROR if result < 0 else ST_OK)
        op = following
    sync_start(e, ds)


cdef void flush_next(Engine* e, Op* op) noexcept nogil:
    """A flush goes through the devices one after another: it is in one device's list at a time."""
    cdef DeviceState* ds
    cdef Conn* c = conn_by_id(e, op.conn_id)
    cdef uint32_t asker = 0 if c == NULL else (<Session*>c.user).node_id
    while op.first < e.device_count:
        ds = &e.devices[op.first]
        op.first += 1
        device_failed(e, ds)
        if not ds.d.failed and (ds.d.needs_sync or ds.sync_running or ds.checkpoint == 2):
            sync_wait_on(e, op, ds)
            return
    op_settle(e, op, PENDING_SYNC, flush_status(e, op.h.volume_id, asker))


cdef void checkpoint_start(Engine* e) noexcept nogil:
    cdef uint32_t i, at
    cdef DeviceState* ds
    cdef Chunk* c
    cdef int64_t generation, result
    for i in range(e.device_count):
        ds = &e.devices[i]
        device_failed(e, ds)                               # also what failed where nobody told of it
        if ds.d.failed or ds.checkpoint:
            continue
        generation = device_checkpoint_begin(ds.d)
        if generation < 0:
            device_failed(e, ds)
            continue
        ds.generation += 1
        ds.checkpoint_generation = generation
        ds.checkpoint_started_ns = e.now_ns
        for at in range(e.table_capacity):
            c = e.table[at]
            while c != NULL:
                result = 0
                if c.slot != SLOT_NONE and c.device == i and (c.ops != NULL or c.unsynced or c.doubtful):
                    result = chunk_intent(e, c)
                elif (c.slot == SLOT_NONE and (c.unsynced and not c.told or c.doubtful) and i == 0
                        and not chunk_missing(e, c)):
                    result = device_intent(ds.d, c.volume_id, c.index, SLOT_NONE)
                if result < 0:                             # would be lost with the older generation
                    device_fail(ds.d, <int>result)
                c = c.hash_next
        ds.checkpoint_mark = device_journal_appended(ds.d)
        ds.checkpoint = 1
        if device_journal_durable(ds.d) >= ds.checkpoint_mark:
            checkpoint_go(e, ds)
        else:
            commit_start(e, ds)


cdef void checkpoint_go(Engine* e, DeviceState* ds) noexcept nogil:
    ds.checkpoint = 2
    device_sync_begin(ds.d)
    submit(e, ds, &ds.checkpoint_job, JOB_CHECKPOINT, checkpoint_run)


cdef void checkpoint_done(Engine* e, DeviceState* ds) noexcept nogil:
    ds.checkpoint = 0
    if ds.checkpoint_job.result < 0:
        device_failed(e, ds)
        return
    device_checkpoint_end(ds.d)
    ds.refused = 0
    e.counters.checkpoints += 1
    emit(e, EV_CHECKPOINT, 0, ds.checkpoint_generation, 0, e.now_ns - ds.checkpoint_started_ns, NULL, 0)


cdef void durability_done(Engine* e, Job* job) noexcept nogil:
    if job.kind == JOB_COMMIT:
        commit_done(e, <DeviceState*>job.owner)
    elif job.kind == JOB_SYNC:
        sync_done(e, <DeviceState*>job.owner)
    elif job.kind == JOB_WRITEBACK:
        e.writeback_running = False
    else:
        checkpoint_done(e, <DeviceState*>job.owner)


cdef void last_checkpoint(Engine* e) noexcept nogil:
    """After the thread: everything synced, chunks that still may differ keep their intents."""
    cdef uint32_t i, at
    cdef bint kept
    cdef Chunk* c
    cdef Device* d
    for i in range(e.device_count):
        d = e.devices[i].d
        if d.failed:
            continue
        device_checkpoint_begin(d)                         # or goes on with the one that the stop cut off
        kept = True
        for at in range(e.table_capacity):
            c = e.table[at]
            while c != NULL:
                if (c.unsynced or c.doubtful or c.ops != NULL) and (
                        c.slot != SLOT_NONE and c.device == i
                        or c.slot == SLOT_NONE and i == 0 and not (c.told and not c.doubtful or chunk_missing(e, c))):
                    kept = device_intent(d, c.volume_id, c.index, c.slot) >= 0 and kept
                c = c.hash_next
        device_sync_begin(d)
        if device_journal_commit(d) == 0 and device_sync_all(d) == 0 and kept and device_journal_void(d) == 0:
            device_checkpoint_end(d)
