"""Requests of the SDC engine: checked, throttled, cut into parts, joined, answered.

Owns a request from its start to its answer. The engine's thread runs every function. Promises exactly one answer per
request, at the latest at its deadline; that a request's data stays until the answer; and that a range is judged
against the volume's size before anything is sent.
"""

from libc.errno cimport EFBIG, EIO, ENODEV, ENOMEM, ENOSPC, ENXIO, EROFS
from libc.stdlib cimport malloc
from libc.string cimport memcpy
from datapath.connection cimport buf_get, buf_put, buf_ref
from datapath.fuseabi cimport FuseWriteOut
from datapath.fusechannel cimport channel_error, channel_reply
from datapath.histogram cimport HIST_BUCKETS, hist_record
from datapath.ratelimit cimport rate_spend, rate_wait_ns
from datapath.sdcflush cimport flush_begin, flush_member, flush_note, flush_tidied
from datapath.sdclink cimport part_cancel, part_route
from datapath.sdcstate cimport *
from datapath.wire cimport (BLOCK_SHIFT, BLOCK_SIZE, CHUNK_BLOCKS, CHUNK_SHIFT, CHUNK_SIZE, FLAG_ABSENT, FLAG_ZEROS,
                            IO_SIZE_MAX, OP_DISCARD, OP_FLUSH, OP_READ, OP_SEEK, OP_WRITE)

cdef enum:
    PARTS_PER_IO = 4                 # in flight at a time for one read or write
    PARTS_PER_WALK = 16              # the same for a discard or a seek, which may cover every chunk of a volume
    STREAK_MIN = 4                   # flushes with one write before each, until the next is expected
    COMMIT_BYTES_MAX = 131072        # a larger write gains little from it

cdef uint64_t NOT_FOUND = <uint64_t>-1


# -- start

cdef void request_from_fuse(void* context, FuseIo* io) noexcept nogil:
    cdef Engine* e = <Engine*>context
    cdef Request* r = request_new(e)
    if r == NULL:
        channel_error(&e.channel, io.unique, ENOMEM)
        if io.owner != NULL:
            buf_put(&e.pool, io.owner)
        return
    r.source = FROM_FUSE
    r.unique = io.unique
    r.volume = <Volume*>io.volume
    r.kind = <uint8_t>io.kind
    r.keep_size = io.keep_size
    r.from_cache = io.from_cache
    r.all_data = io.all_data
    r.offset = io.offset
    r.length = io.length
    r.data = io.data
    r.buffer = io.owner
    request_start(e, r)


cdef int _check(Engine* e, Request* r) noexcept nogil:
    """Judges the range against the volume, and cuts it to what can be done. 0 or an errno."""
    cdef Volume* v = r.volume
    cdef uint64_t room = v.size - r.offset if r.offset < v.size else 0
    if v.removed:
        return ENODEV
    if r.kind == REQ_FLUSH:
        r.length = 0
        return 0
    if r.kind == REQ_READ:
        r.length = min(r.length, room)
        return 0
    if r.kind == REQ_SEEK_DATA or r.kind == REQ_SEEK_HOLE:
        r.length = room
        r.found = r.offset if r.all_data and r.kind == REQ_SEEK_DATA else NOT_FOUND
        r.next = room if r.all_data else 0
        return 0 if room else ENXIO
    if v.read_only:
        return EROFS
    if r.kind == REQ_DISCARD:
        if r.length > room and not r.keep_size:
            return EFBIG
        r.length = min(r.length, room)
        return 0
    if r.length > room and r.from_cache:
        # With a write-back cache the kernel lets a file grow without asking. Only trio can make it take the size back.
        emit(e, EV_PAST_END, 0, v.id, 0, 0, NULL, 0)
    # A write across the end is cut short, as a disk does; the next one then begins at the end.
    if room == 0 and r.length:
        return ENOSPC if r.offset == v.size else EFBIG
    r.length = min(r.length, room)
    return 0


cdef void request_start(Engine* e, Request* r) noexcept nogil:
    cdef Volume* v = r.volume
    r.started_ns = e.now_ns
    e.request_count += 1
    r.error = _check(e, r)
    if r.kind == REQ_READ or r.kind == REQ_WRITE:
        r.cost = r.buffer.size if r.buffer != NULL else r.length
        e.request_bytes += r.cost
    if r.error or (r.length == 0 and r.kind != REQ_FLUSH):
        request_finish(e, r)
        return
    if r.kind <= REQ_DISCARD and (v.iops_limit.rate or v.bytes_limit.rate):
        if not list_empty(&v.throttled) or _limit_wait(e, v):
            _throttle(e, r)
            return
        _limit_spend(r)
    _admit(e, r)


cdef inline void _expect_flush(Request* r) noexcept nogil:
    """A write that will be flushed right after it goes to both disks before it is answered, and saves the flush a turn
    over the network. Whoever flushed after each of the last writes (a database's log) is expected to do so again."""
    cdef Volume* v = r.volume
    r.commit = False
    if r.kind == REQ_FLUSH:
        v.flush_streak = v.flush_streak + 1 if v.writes_since_flush == 1 else 0
        v.writes_since_flush = 0
    elif r.kind == REQ_WRITE or r.kind == REQ_DISCARD:
        v.writes_since_flush += 1
        if v.writes_since_flush > 1:
            v.flush_streak = 0
        r.commit = r.kind == REQ_WRITE and v.flush_streak >= STREAK_MIN and r.length <= COMMIT_BYTES_MAX


cdef void _admit(Engine* e, Request* r) noexcept nogil:
    r.deadline_ns = e.now_ns + e.deadline_ns
    list_append(&e.active, &r.link)
    _expect_flush(r)
    if r.kind == REQ_FLUSH:
        flush_begin(e, r)
    else:
        _pump(e, r)


# -- limits

cdef inline uint64_t _limit_wait(Engine* e, Volume* v) noexcept nogil:
    return max(rate_wait_ns(&v.iops_limit, e.now_ns), rate_wait_ns(&v.bytes_limit, e.now_ns))


cdef inline void _limit_spend(Request* r) noexcept nogil:
    rate_spend(&r.volume.iops_limit, 1)
    if r.kind != REQ_DISCARD:
        rate_spend(&r.volume.bytes_limit, r.length)


cdef void _throttle(Engine* e, Request* r) noexcept nogil:
    cdef Volume* v = r.volume
    list_append(&v.throttled, &r.link)
    if not v.is_throttled:
        _wait_for_limit(e, v, _limit_wait(e, v))


cdef void _wait_for_limit(Engine* e, Volume* v, uint64_t wait) noexcept nogil:
    v.is_throttled = True
    list_append(&e.throttled, &v.throttle_link)
    if e.throttle_ns == 0 or e.now_ns + wait < e.throttle_ns:
        e.throttle_ns = e.now_ns + wait


cdef void requests_run_throttled(Engine* e) noexcept nogil:
    cdef Link all
    cdef Volume* v
    cdef Request* r
    cdef uint64_t wait
    if e.throttle_ns == 0 or e.throttle_ns > e.now_ns:
        return
    e.throttle_ns = 0
    list_init(&all)
    list_take_all(&e.throttled, &all)
    while not list_empty(&all):
        v = <Volume*>all.next
        list_remove(&v.throttle_link)
        v.is_throttled = False
        while not list_empty(&v.throttled):
            wait = _limit_wait(e, v)
            if wait:
                _wait_for_limit(e, v, wait)
                break
            r = <Request*>v.throttled.next
            list_remove(&r.link)
            _limit_spend(r)
            _admit(e, r)


# -- parts

cdef void _shape(Part* p, Request* r, uint64_t at, uint64_t left) noexcept nogil:
    """Fills in the next part: from byte `at` of the volume, at most `left` bytes of the request."""
    cdef uint32_t inside = <uint32_t>(at & (CHUNK_SIZE - 1))
    cdef uint32_t edge = inside & (BLOCK_SIZE - 1)
    cdef uint32_t take = <uint32_t>min(left, <uint64_t>(CHUNK_SIZE - inside))
    p.chunk = <uint32_t>(at >> CHUNK_SHIFT)
    p.offset = inside
    if r.kind == REQ_READ:
        # Whole blocks travel, since check values are of whole blocks.
        p.opcode = OP_READ
        p.offset = inside - edge
        take = min(take, <uint32_t>IO_SIZE_MAX)
        p.length = (edge + take + BLOCK_SIZE - 1) & ~<uint32_t>(BLOCK_SIZE - 1)
        p.skip = edge
    elif r.kind == REQ_WRITE:
        p.opcode = OP_WRITE
        take = min(take, <uint32_t>IO_SIZE_MAX)
        p.length = take
    elif r.kind == REQ_DISCARD:
        if edge or take < BLOCK_SIZE:
            p.opcode = OP_WRITE      # of zeros, to the end of the block or of the range
            take = min(take, <uint32_t>BLOCK_SIZE - edge)
        else:
            p.opcode = OP_DISCARD
            take &= ~<uint32_t>(BLOCK_SIZE - 1)
        p.length = take
    else:
        p.opcode = OP_SEEK           # answers for the whole chunk
        p.offset = 0
    p.take = take


cdef void _pump(Engine* e, Request* r) noexcept nogil:
    """Makes parts while there is something left to ask for, and answers when there is nothing left to wait for."""
    cdef Part* p
    cdef uint32_t most = PARTS_PER_IO if r.kind <= REQ_WRITE else PARTS_PER_WALK
    r.pumping = True
    while r.next < r.length and r.live < most and r.error == 0:
        p = part_new(e)
        if p == NULL:
            r.error = ENOMEM
            break
        _shape(p, r, r.offset + r.next, r.length - r.next)
        request_link(e, r, p)
        p.position = r.next
        r.next += p.take
        part_route(e, p)
    r.pumping = False
    if r.error:
        _cancel_waiting(e, r)
    if r.live == 0:
        request_finish(e, r)


cdef void request_link(Engine* e, Request* r, Part* p) noexcept nogil:
    p.request = r
    p.volume = r.volume
    e.op_id += 1
    p.op_id = e.op_id
    p.sibling = r.parts
    r.parts = p
    r.live += 1


cdef void _unlink(Request* r, Part* p) noexcept nogil:
    cdef Part** at = &r.parts
    while at[0] != p:
        at = &at[0].sibling
    at[0] = p.sibling
    r.live -= 1


cdef void _cancel_waiting(Engine* e, Request* r) noexcept nogil:
    """The request has failed: parts that were not sent never will be. Those in flight are waited for, so that a write
    that failed is not applied after the application has gone on."""
    cdef Part** at = &r.parts
    cdef Part* p
    while at[0] != NULL:
        p = at[0]
        if p.state == PART_SENT:
            at = &p.sibling
            continue
        at[0] = p.sibling
        r.live -= 1
        part_cancel(e, p)


cdef void request_part_done(Engine* e, Part* p, int error, int reason, const Header* h, char* body) noexcept nogil:
    cdef Request* r = p.request
    _unlink(r, p)
    if p.opcode == OP_FLUSH:
        flush_member(e, r, p, error, reason, h)
        part_free(e, p)
        return
    if error:
        if r.error == 0:
            r.error = error
            r.reason = <uint8_t>reason
    elif p.opcode == OP_READ:
        _join(e, r, p, body)
    elif p.opcode == OP_SEEK:
        _look(r, p, h, body)
    elif not r.commit and flush_note(e, p, h.incarnation) < 0:
        r.error = ENOMEM             # a write that a flush would forget is no write
    part_free(e, p)
    if not r.pumping:
        _pump(e, r)


cdef void _join(Engine* e, Request* r, Part* p, char* payload) noexcept nogil:
    """Takes a read's bytes: of the only part by reference (it is answered before the buffer is reused), else by
    copy."""
    if p.take == r.length:
        r.data = payload + p.skip
        return
    if r.buffer == NULL:
        r.buffer = buf_get(&e.pool, r.length)
        if r.buffer == NULL:
            r.error = ENOMEM
            return
        r.data = r.buffer.data
    memcpy(r.data + p.position, payload + p.skip, p.take)


cdef void _look(Request* r, Part* p, const Header* h, const char* bitmap) noexcept nogil:
    """Finds the first byte of data (or of a hole) in one chunk's part of the range."""
    cdef uint64_t base = <uint64_t>p.chunk << CHUNK_SHIFT
    cdef uint64_t at = r.offset + p.position
    cdef uint32_t block = <uint32_t>((at - base) >> BLOCK_SHIFT)
    cdef bint wanted = r.kind == REQ_SEEK_DATA
    cdef bint absent = (h.flags & (FLAG_ZEROS | FLAG_ABSENT)) != 0
    cdef bint data
    while block < CHUNK_BLOCKS:
        data = False if absent else (bitmap[block >> 3] >> (block & 7)) & 1
        if data == wanted:
            break
        block += 1
    else:
        return
    at = max(at, base + (<uint64_t>block << BLOCK_SHIFT))
    if at < r.offset + r.length and at < r.found:
        r.found = at
        r.next = r.length            # later chunks cannot come before it; those already asked are waited for


# -- the answer

cdef void request_finish(Engine* e, Request* r) noexcept nogil:
    """Answers, counts, frees. No part is left."""
    list_remove(&r.link)
    if r.source == FROM_ENGINE:
        flush_tidied(r)
        request_free(e, r)
        return
    e.request_count -= 1
    e.request_bytes -= r.cost
    _count(e, r)
    if r.error and r.reason and r.source != FROM_BENCH:
        emit(e, EV_IO_ERROR, r.reason, r.volume.id, <uint64_t>r.error, r.offset, NULL, 0)
    if r.source == FROM_FUSE:
        _answer_fuse(e, r)
    elif r.source == FROM_PYTHON:
        _answer_python(e, r)
    if r.source == FROM_BENCH:
        _bench_next(e, r)
    else:
        request_free(e, r)


cdef void _count(Engine* e, Request* r) noexcept nogil:
    cdef Volume* v = r.volume
    cdef uint64_t elapsed = e.now_ns - r.started_ns
    if r.error:
        v.errors += r.error != ENXIO
    elif r.kind == REQ_READ:
        v.read_ops += 1
        v.read_bytes += r.length
        hist_record(&v.read_latency, elapsed)
    elif r.kind == REQ_WRITE:
        v.write_ops += 1
        v.write_bytes += r.length
        hist_record(&v.write_latency, elapsed)
    elif r.kind == REQ_FLUSH:
        v.flush_ops += 1
        v.flush_ns += elapsed
    elif r.kind == REQ_DISCARD:
        v.discard_ops += 1
        v.discard_bytes += r.length
    else:
        v.seek_ops += 1


cdef inline int _seek_result(Request* r, uint64_t* at) noexcept nogil:
    """The end of the volume counts as a hole, not as data."""
    if r.found == NOT_FOUND:
        if r.kind == REQ_SEEK_DATA:
            return ENXIO
        r.found = r.offset + r.length
    at[0] = r.found
    return 0


cdef void _answer_fuse(Engine* e, Request* r) noexcept nogil:
    cdef FuseWriteOut written
    cdef uint64_t at = 0
    cdef int error = r.error
    if error == 0 and r.kind >= REQ_SEEK_DATA:
        error = _seek_result(r, &at)
    if error:
        channel_error(&e.channel, r.unique, error)
    elif r.kind == REQ_READ:
        channel_reply(&e.channel, r.unique, r.data, r.length)
    elif r.kind == REQ_WRITE:
        written.size = <uint32_t>r.length
        written.padding = 0
        channel_reply(&e.channel, r.unique, &written, sizeof(written))
    elif r.kind >= REQ_SEEK_DATA:
        channel_reply(&e.channel, r.unique, &at, sizeof(at))
    else:
        channel_error(&e.channel, r.unique, 0)


cdef void _answer_python(Engine* e, Request* r) noexcept nogil:
    cdef char* data = NULL
    cdef uint64_t size = 0
    cdef uint64_t at = 0
    cdef int error = r.error
    if error == 0 and r.kind == REQ_READ and r.length:
        size = r.length
    elif error == 0 and r.kind >= REQ_SEEK_DATA:
        error = _seek_result(r, &at)
        size = sizeof(at) if error == 0 else 0
    if size:
        data = <char*>malloc(size)
        if data == NULL:
            error = ENOMEM
            size = 0
        else:
            memcpy(data, r.data if r.kind == REQ_READ else <char*>&at, size)
    emit(e, EV_COMPLETED, <uint32_t>error, r.unique, r.length, 0, data, size)


# -- ends that do not come from an SDS

cdef void request_cancel(Engine* e, Request* r) noexcept nogil:
    cdef Part* p
    while r.parts != NULL:
        p = r.parts
        r.parts = p.sibling
        part_cancel(e, p)
    r.live = 0


cdef void _fail_now(Engine* e, Request* r, int error, int reason) noexcept nogil:
    request_cancel(e, r)
    r.error = error
    r.reason = <uint8_t>reason
    request_finish(e, r)


cdef void requests_run_deadlines(Engine* e) noexcept nogil:
    cdef Request* r
    while not list_empty(&e.active):
        r = <Request*>e.active.next
        if r.deadline_ns > e.now_ns:
            return
        _fail_now(e, r, EIO, WHY_DEADLINE)


cdef void _fail_list(Engine* e, Link* requests, Volume* v, int error, int reason) noexcept nogil:
    cdef Link all
    cdef Request* r
    list_init(&all)
    list_take_all(requests, &all)
    while not list_empty(&all):
        r = <Request*>all.next
        if v == NULL or r.volume == v:
            _fail_now(e, r, error, reason)
        else:
            list_remove(&r.link)
            list_append(requests, &r.link)


cdef void requests_fail(Engine* e, Volume* v, int error, int reason) noexcept nogil:
    cdef uint32_t i
    if v == NULL:
        e.bench.end_ns = 0
    for i in range(e.volume_count):
        if v == NULL or e.volumes[i] == v:
            _fail_list(e, &e.volumes[i].throttled, v, error, reason)
    _fail_list(e, &e.active, v, error, reason)


# -- the load generator

cdef inline uint64_t _random(Bench* b) noexcept nogil:
    b.random ^= b.random << 13
    b.random ^= b.random >> 7
    b.random ^= b.random << 17
    return b.random


cdef void _bench_issue(Engine* e, Request* r) noexcept nogil:
    cdef Bench* b = &e.bench
    cdef uint64_t block
    if b.sequential:
        block = b.cursor % b.blocks
        b.cursor += 1
    else:
        block = _random(b) % b.blocks
    r.source = FROM_BENCH
    r.volume = b.volume
    r.kind = b.kind
    r.offset = block * b.block_size
    r.length = b.block_size
    if b.kind == REQ_WRITE:
        r.buffer = buf_ref(b.payload)
        r.data = b.payload.data
    request_start(e, r)


cdef void _bench_next(Engine* e, Request* r) noexcept nogil:
    cdef Bench* b = &e.bench
    if r.error == 0:
        b.ops += 1
        hist_record(&b.latency, e.now_ns - r.started_ns)
    else:
        b.errors += 1
    request_free(e, r)
    b.live -= 1
    # A load that only meets errors would spin: it ends.
    if e.now_ns < b.end_ns and b.errors == 0:
        r = request_new(e)
        if r != NULL:
            b.live += 1
            _bench_issue(e, r)
            return
    if b.live == 0:
        _bench_end(e)


cdef void _bench_end(Engine* e) noexcept nogil:
    """Reports: elapsed ns, operations, errors, then the latency buckets, all uint64."""
    cdef Bench* b = &e.bench
    cdef uint64_t size = (3 + HIST_BUCKETS) * sizeof(uint64_t)
    cdef uint64_t* out = <uint64_t*>malloc(size)
    if out != NULL:
        out[0] = e.now_ns - b.start_ns
        out[1] = b.ops
        out[2] = b.errors
        memcpy(out + 3, b.latency.buckets, HIST_BUCKETS * sizeof(uint64_t))
    emit(e, EV_COMPLETED, EIO if b.errors else 0, 0, b.ops, 0, <char*>out, size if out != NULL else 0)
    if b.payload != NULL:
        buf_put(&e.pool, b.payload)
        b.payload = NULL
    b.running = False


cdef void bench_start(Engine* e, uint32_t depth) noexcept nogil:
    cdef Bench* b = &e.bench
    cdef Request* r
    cdef uint32_t _slot
    b.running = True
    b.live = depth                   # counted first: a request that fails at once must not end it early
    for _slot in range(depth):
        r = request_new(e)
        if r == NULL:
            b.live -= 1
            continue
        _bench_issue(e, r)
    if b.live == 0 and b.running:
        _bench_end(e)
