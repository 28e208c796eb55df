"""The SDC engine: one thread that owns /dev/fuse, the relay to pyfuse3 and one connection per SDS, and its mailbox.

Owns the epoll loop, the commands and the events. The layers under it: ``sdcrequest`` (requests to parts and back),
``sdclink`` (parts to SDSs and back), ``sdcstate`` (the structures). Assumes that all methods are called by one
thread; they only write to the mailbox or read counters. Promises that the thread never waits for Python.
"""

import errno as errno_module
import os
import struct
import threading

from libc.errno cimport EINVAL, EIO, ENODEV, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close
from datapath.connection cimport buf_get
from datapath.flushset cimport flushset_destroy, flushset_init
from datapath.fusechannel cimport (channel_can_read, channel_destroy, channel_init, channel_notify, channel_read,
                                   channel_relay_flush, channel_relay_read)
from datapath.histogram cimport hist_list
from datapath.ratelimit cimport rate_set
from datapath.ring cimport Message, ring_clear, ring_pop, ring_push, ring_retry
from datapath.sdcflush cimport flush_run_tidy, flush_segment_set, flush_spares
from datapath.sdclink cimport *
from datapath.sdcmove cimport link_run_hedges, link_segment_changed
from datapath.sdcrequest cimport *
from datapath.sdcstate cimport *
from datapath.volumemap cimport map_segment_drop
from datapath.waiting cimport (EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLLIN, EPOLLOUT, epoll_create1, epoll_ctl,
                               epoll_event, epoll_wait, pfvol_short_slice)
from datapath.wire cimport IO_SIZE_MAX, bad_frame_text

cdef extern from "<sys/timerfd.h>" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    cdef struct itimerspec:
        timespec it_interval
        timespec it_value
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec* value, itimerspec* old)
    int CLOCK_MONOTONIC, TFD_NONBLOCK, TFD_CLOEXEC
cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void* data, size_t size)

cdef enum:
    EVENTS_PER_TURN = 64
    OP_ID_BITS = 42                  # below the incarnation: no two sessions have an operation of one number
    # epoll data: an SDS's index, or one of these
    ON_MAILBOX = 0x10000
    ON_FUSE = 0x10001
    ON_RELAY = 0x10002
    ON_TIMER = 0x10003
    DEPTH_MAX = 4096
    IDLE_MS_MAX = 1000               # how long the thread sleeps at most: overflowed events are looked after
    FROZEN_NS = 2000000000           # a turn that took longer means that the process was not run

cdef enum Command:
    CMD_STOP = 1
    CMD_ADD_SDS = 2
    CMD_REMOVE_SDS = 3
    CMD_ADD_VOLUME = 4
    CMD_SET_VOLUME = 5
    CMD_SET_CAPABILITY = 6
    CMD_REMOVE_VOLUME = 7
    CMD_SET_SEGMENT = 8
    CMD_SUBMIT = 9
    CMD_BENCH = 10
    CMD_INVALIDATE = 11

# What ADD_VOLUME and SET_VOLUME carry, followed by the capability.
cdef struct VolumeArguments:
    uint64_t inode
    uint64_t size
    uint64_t iops_limit
    uint64_t bytes_limit

cdef struct BenchArguments:
    uint64_t block_size
    uint64_t nanoseconds
    uint64_t span
    uint32_t depth
    uint8_t kind
    uint8_t sequential


# -- the thread

cdef void _watch(Engine* e, int operation, int fd, uint64_t what, uint32_t events) noexcept nogil:
    cdef epoll_event event
    event.events = events
    event.data.u64 = what
    epoll_ctl(e.epoll_fd, operation, fd, &event)


cdef void _run(Engine* e) noexcept nogil:
    """The engine's thread, whole."""
    cdef epoll_event events[EVENTS_PER_TURN]
    cdef int count, i
    cdef uint64_t what, expired
    pfvol_short_slice()
    while not e.stopping:
        count = epoll_wait(e.epoll_fd, events, EVENTS_PER_TURN, -1 if _sleep_until(e, _timeout_ms(e)) else 0)
        _look_at_clock(e)
        for i in range(count):
            what = events[i].data.u64
            if what == ON_MAILBOX:
                _read_commands(e)
            elif what == ON_FUSE:
                e.fuse_more = True
            elif what == ON_RELAY:
                e.relay_more = True
            elif what == ON_TIMER:
                c_read(e.timer_fd, &expired, sizeof(expired))
                e.timer_ns = 0
            elif what < e.sds_count:
                _sds_ready(e, e.sds[what], events[i].events)
        if e.has_channel:
            _serve_channel(e)
        requests_run_deadlines(e)
        requests_run_throttled(e)
        link_run_backoff(e)
        link_run_hedges(e)
        flush_run_tidy(e)
        link_flush(e)
        ring_retry(&e.events)
    _shut_down(e)


cdef void _look_at_clock(Engine* e) noexcept nogil:
    cdef uint64_t now = clock_ns() - e.skipped_ns
    if now - e.now_ns > FROZEN_NS:
        # Stopped, or the host slept: answers may lie in the sockets, so this time counts for no deadline.
        e.skipped_ns += now - e.now_ns - FROZEN_NS
        now = e.now_ns + FROZEN_NS
    e.now_ns = now


cdef void _sds_ready(Engine* e, Sds* s, uint32_t events) noexcept nogil:
    if events & EPOLLOUT:
        link_writable(e, s)
    if events & ~<uint32_t>EPOLLOUT:
        link_receive(e, s)


cdef inline int _until(Engine* e, uint64_t when_ns, int most) noexcept nogil:
    """The timeout that ends just after `when_ns`, if that is sooner than `most`."""
    cdef uint64_t ms
    if when_ns <= e.now_ns:
        return 0
    ms = (when_ns - e.now_ns) // 1000000 + 1
    return <int>ms if ms < <uint64_t>most else most


cdef int _timeout_ms(Engine* e) noexcept nogil:
    cdef int timeout = IDLE_MS_MAX
    if (e.fuse_more and _may_read(e)) or e.relay_more or e.to_flush_count:
        return 0
    if not list_empty(&e.active):
        timeout = _until(e, (<Request*>e.active.next).deadline_ns, timeout)
    if e.backoff_ns:
        timeout = _until(e, e.backoff_ns, timeout)
    if e.hedge_ns:
        timeout = _until(e, e.hedge_ns, timeout)
    if e.tidy_ns:
        timeout = _until(e, e.tidy_ns, timeout)
    if e.throttle_ns:
        timeout = _until(e, e.throttle_ns, timeout)
    return timeout


cdef bint _sleep_until(Engine* e, int timeout_ms) noexcept nogil:
    """Has the timer wake the thread by then. False when there is something to do now.

    A timer that fires sooner stays as it is: nearly every answer comes before its timeout, and a timeout that is set
    and cleared for each sleep (epoll_wait's) cost a fifth of the reads at depth one.
    """
    cdef itimerspec when
    cdef uint64_t at = e.now_ns + <uint64_t>timeout_ms * 1000000
    if timeout_ms == 0:
        return False
    if e.timer_ns == 0 or at < e.timer_ns:
        memset(&when, 0, sizeof(when))
        when.it_value.tv_sec = timeout_ms // 1000
        when.it_value.tv_nsec = timeout_ms % 1000 * 1000000
        timerfd_settime(e.timer_fd, 0, &when, NULL)
        e.timer_ns = at
    return True


cdef inline bint _may_read(Engine* e) noexcept nogil:
    """There is room for more requests: in number, in bytes, and towards pyfuse3."""
    return e.request_count < REQUESTS_MAX and e.request_bytes < REQUEST_BYTES_MAX and channel_can_read(&e.channel)


cdef void _serve_channel(Engine* e) noexcept nogil:
    cdef int relay = e.channel.relay_fd
    cdef int fuse = e.channel.fuse_fd
    cdef int result
    cdef bint full
    if e.relay_more and relay >= 0:
        result = channel_relay_read(&e.channel)
        e.relay_more = result > 0
        if result < 0:
            emit(e, EV_RELAY_CLOSED, 0, 0, 0, 0, NULL, 0)
    if e.fuse_more and _may_read(e):
        result = channel_read(&e.channel)
        e.fuse_more = result > 0
        if result == -ENODEV:
            emit(e, EV_UNMOUNTED, 0, 0, 0, 0, NULL, 0)
    full = e.fuse_more and not _may_read(e)
    if e.channel.fuse_fd >= 0 and e.fuse_armed == full:
        # Readable is level-triggered: while messages wait for room the descriptor must not wake the thread.
        e.fuse_armed = not full
        _watch(e, EPOLL_CTL_MOD, fuse, ON_FUSE, EPOLLIN if e.fuse_armed else 0)
    if e.channel.relay_fd >= 0:
        full = channel_relay_flush(&e.channel) > 0
        if full != e.relay_armed_out:
            e.relay_armed_out = full
            _watch(e, EPOLL_CTL_MOD, relay, ON_RELAY, EPOLLIN | (EPOLLOUT if full else 0))


cdef void _shut_down(Engine* e) noexcept nogil:
    cdef uint32_t i
    cdef Message m
    requests_fail(e, NULL, EIO, WHY_STOPPED)
    while ring_pop(&e.commands, &m):
        if m.kind == CMD_ADD_SDS:
            close(<int>m.b)
        free(m.data)
    for i in range(e.sds_count):
        link_drop(e, e.sds[i], 0, False)
    if e.has_channel:
        channel_destroy(&e.channel)
    close(e.epoll_fd)
    close(e.timer_fd)
    e.epoll_fd = e.timer_fd = -1


# -- commands (the engine's thread)

cdef void _read_commands(Engine* e) noexcept nogil:
    cdef Message m
    ring_clear(&e.commands)
    while not e.stopping and ring_pop(&e.commands, &m):
        _obey(e, &m)
        free(m.data)


cdef void _obey(Engine* e, Message* m) noexcept nogil:
    cdef Volume* v
    cdef Sds* s
    if m.kind == CMD_STOP:
        e.stopping = True
    elif m.kind == CMD_ADD_SDS:
        link_attach(e, m.a, <int>m.b, m.c)
    elif m.kind == CMD_REMOVE_SDS:
        s = sds_get(e, m.a)
        if s != NULL:
            link_drop(e, s, 0, False)
            s.closed_ns = 0          # gone for good: no flush waits for it
    elif m.kind == CMD_ADD_VOLUME:
        _add_volume(e, m)
    elif m.kind == CMD_INVALIDATE:
        if e.has_channel:
            channel_notify(&e.channel, m.data, m.size)
    else:
        v = volume_find(e, m.b)
        if m.kind == CMD_SUBMIT:
            _submit(e, m, v)
        elif m.kind == CMD_BENCH:
            _bench(e, m, v)
        elif v != NULL:
            _change_volume(e, m, v)


cdef void _change_volume(Engine* e, Message* m, Volume* v) noexcept nogil:
    if m.kind == CMD_SET_VOLUME:
        _volume_arguments(e, v, <VolumeArguments*>m.data, m.a != 0)
    elif m.kind == CMD_SET_CAPABILITY:
        _set_capability(v, m.data, m.size)
        link_capability_changed(e, v)
    elif m.kind == CMD_SET_SEGMENT:
        # Without memory for it too: what waits asks for it again.
        if not v.removed and flush_segment_set(e, v, <uint32_t>m.c, m.data, m.size) != -EINVAL:
            link_segment_changed(e, v, <uint32_t>m.c)
    elif m.kind == CMD_REMOVE_VOLUME:
        v.removed = True
        requests_fail(e, v, ENODEV, WHY_NONE)
        _forget_volume(e, v)


cdef void _forget_volume(Engine* e, Volume* v) noexcept nogil:
    """What is known about the volume may be wrong when it is mapped again."""
    cdef uint32_t i
    for i in range(v.map.segment_count):
        map_segment_drop(v.map, i)
    memset(v.asked, 0, v.asked_bytes)
    memset(v.caps, CAP_NONE, SDS_MAX)
    v.capability_version += 1
    flushset_destroy(&v.dirty)
    flushset_init(&v.dirty)


cdef void _volume_arguments(Engine* e, Volume* v, const VolumeArguments* a, bint read_only) noexcept nogil:
    v.size = a.size
    v.read_only = read_only
    volume_fit_asked(v)
    # An unchanged limit keeps its bucket: setting the size must not hand out a new burst.
    if v.iops_limit.rate != a.iops_limit:
        rate_set(&v.iops_limit, a.iops_limit, e.now_ns)
    if v.bytes_limit.rate != a.bytes_limit:
        rate_set(&v.bytes_limit, a.bytes_limit, e.now_ns)
    if not list_empty(&v.throttled):
        e.throttle_ns = e.now_ns


cdef void _set_capability(Volume* v, const char* data, uint64_t size) noexcept nogil:
    cdef char* copy = <char*>malloc(size if size else 1)
    if copy == NULL:
        return
    memcpy(copy, data, size)
    free(v.capability)
    v.capability = copy
    v.capability_size = <uint32_t>size
    v.capability_version += 1


cdef void _add_volume(Engine* e, Message* m) noexcept nogil:
    cdef VolumeArguments* a = <VolumeArguments*>m.data
    cdef Volume* v = volume_get(e, m.b, a.inode)
    if v == NULL:
        return
    _volume_arguments(e, v, a, m.a != 0)
    _set_capability(v, m.data + sizeof(VolumeArguments), m.size - sizeof(VolumeArguments))
    if v.removed:
        v.removed = False
    else:
        link_capability_changed(e, v)


cdef void _submit(Engine* e, Message* m, Volume* v) noexcept nogil:
    cdef Request* r = request_new(e) if v != NULL else NULL
    if r == NULL:
        emit(e, EV_COMPLETED, ENODEV, m.c >> 8, 0, 0, NULL, 0)
        return
    r.source = FROM_PYTHON
    r.volume = v
    r.kind = <uint8_t>(m.c & 0xff)
    r.unique = m.c >> 8
    r.offset = m.d
    r.length = m.a
    r.keep_size = True
    if r.kind == REQ_DISCARD:
        r.length = (<uint64_t*>m.data)[0]
    elif r.kind == REQ_WRITE:
        r.buffer = buf_get(&e.pool, m.size if m.size else 1)
        if r.buffer == NULL:
            emit(e, EV_COMPLETED, EIO, r.unique, 0, 0, NULL, 0)
            request_free(e, r)
            return
        r.data = r.buffer.data
        memcpy(r.data, m.data, m.size)
    request_start(e, r)


cdef void _bench(Engine* e, Message* m, Volume* v) noexcept nogil:
    cdef BenchArguments* a = <BenchArguments*>m.data
    cdef Bench* b = &e.bench
    cdef uint64_t i
    if v == NULL or b.running:
        emit(e, EV_COMPLETED, ENODEV if v == NULL else EIO, 0, 0, 0, NULL, 0)
        return
    memset(b, 0, sizeof(Bench))
    b.volume = v
    b.kind = a.kind
    b.sequential = a.sequential != 0
    b.block_size = <uint32_t>a.block_size
    b.blocks = a.span // a.block_size
    b.random = 0x9E3779B97F4A7C15
    b.payload = buf_get(&e.pool, b.block_size)
    if b.payload == NULL:
        emit(e, EV_COMPLETED, EIO, 0, 0, 0, NULL, 0)
        return
    for i in range(b.block_size):
        b.payload.data[i] = <char>(i * <uint64_t>2654435761 >> 13)
    b.start_ns = e.now_ns
    b.end_ns = e.now_ns + a.nanoseconds
    bench_start(e, a.depth)


# -- Python's side

_KINDS = {"read": REQ_READ, "write": REQ_WRITE, "discard": REQ_DISCARD, "flush": REQ_FLUSH, "seek_data": REQ_SEEK_DATA,
          "seek_hole": REQ_SEEK_HOLE}
_BENCH_KINDS = {"read": (REQ_READ, 0), "write": (REQ_WRITE, 0), "seqread": (REQ_READ, 1), "seqwrite": (REQ_WRITE, 1)}
_REASONS = {
    WHY_DEADLINE: "no answer within the deadline",
    WHY_COPIES: "no copy could be read",
    WHY_CHECKSUM: "no copy matches its checksum",
    WHY_DISK: "the storage server's disk refused it",
    WHY_SPACE: "the storage server is out of space",
    WHY_FLUSH_LOST: "acknowledged writes were lost before they were flushed: both servers of a pair restarted",
    WHY_PAYLOAD: "the data arrives damaged each time",
    WHY_OLD_SESSION: "a newer session of this client has taken over",
    WHY_BAD_REQUEST: "the storage server does not accept the request",
    WHY_STOPPED: "the client was stopped",
}
_LINK_ERRORS = {
    LINK_UNKNOWN_REQUEST: "answer to a request that was not sent",
    LINK_MISMATCH: "answer that does not fit its request",
}


def _close_reason(code):
    """The text for why a connection closed: an errno, or a negative BadFrame or LinkError."""
    cdef int number
    if code >= 0:
        return os.strerror(code) if code else "closed"
    number = -code
    return _LINK_ERRORS.get(number) or (<bytes>bad_frame_text(number)).decode()


class BenchResult:
    """What a ``bench`` run measured: ``seconds``, ``ops``, ``errors``, ``histogram``."""

    def __init__(self, data: bytes) -> None:
        values = struct.unpack(f"={len(data) // 8}Q", data)
        self.seconds = values[0] / 1e9
        self.ops = values[1]
        self.errors = values[2]
        self.histogram = list(values[3:])


cdef class Initiator:
    """The engine of one SDC. See the .pyi for what each method promises."""

    def __cinit__(self, sdc_id, incarnation, *, io_deadline_seconds=60.0):
        if engine_alloc(&self.engine) < 0:
            raise MemoryError
        self.engine.sdc_id = sdc_id
        self.engine.incarnation = incarnation
        self.engine.op_id = self.engine.incarnation << OP_ID_BITS
        self.engine.deadline_ns = <uint64_t>(io_deadline_seconds * 1e9)
        self.engine.part_done = request_part_done
        self.engine.flush_spares = flush_spares

    def __dealloc__(self):
        # The thread holds a reference to this object: it has ended, or was never started.
        engine_free(&self.engine)

    @property
    def event_fd(self):
        return self.engine.events.event_fd

    def start(self, fuse_fd=-1, relay_fd=-1, *, force_direct=False):
        cdef Engine* e = &self.engine
        if self._started:
            raise RuntimeError("the engine has been started before")
        e.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        e.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if e.epoll_fd < 0 or e.timer_fd < 0:
            raise OSError(errno, os.strerror(errno))
        _watch(e, EPOLL_CTL_ADD, e.timer_fd, ON_TIMER, EPOLLIN)
        _watch(e, EPOLL_CTL_ADD, e.commands.event_fd, ON_MAILBOX, EPOLLIN)
        e.now_ns = clock_ns()
        if fuse_fd >= 0:
            error = channel_init(&e.channel, &e.pool, &e.inodes, fuse_fd, relay_fd, force_direct, request_from_fuse, e)
            if error < 0:
                raise OSError(-error, os.strerror(-error))
            e.has_channel = True
            e.fuse_armed = True
            _watch(e, EPOLL_CTL_ADD, fuse_fd, ON_FUSE, EPOLLIN)
            if relay_fd >= 0:
                _watch(e, EPOLL_CTL_ADD, relay_fd, ON_RELAY, EPOLLIN)
        self._started = True
        self._thread = threading.Thread(target=self._thread_main, name="pfvol-initiator", daemon=True)
        self._thread.start()

    def _thread_main(self):
        with nogil:
            _run(&self.engine)

    def stop(self):
        if not self._started or self._stopped:
            return
        self._stopped = True
        self._command(CMD_STOP)
        while self._thread.is_alive():
            ring_retry(&self.engine.commands)
            self._thread.join(0.1)

    cdef _command(self, uint32_t kind, uint32_t a=0, uint64_t b=0, uint64_t c=0, uint64_t d=0, bytes data=None):
        cdef Message m
        m.kind = kind
        m.a = a
        m.b = b
        m.c = c
        m.d = d
        m.data = NULL
        m.size = 0
        if data is not None:
            m.size = len(data)
            m.data = <char*>malloc(m.size if m.size else 1)
            if m.data == NULL:
                raise MemoryError
            memcpy(m.data, <const char*>data, m.size)
        if ring_push(&self.engine.commands, &m) < 0:
            free(m.data)
            raise MemoryError

    def add_sds(self, sds_id, fd, durable_incarnation):
        if not 0 < sds_id < 65536:
            raise ValueError(f"SDS number {sds_id}")
        if self._stopped:
            os.close(fd)
            return
        self._command(CMD_ADD_SDS, sds_id, fd, durable_incarnation)

    def remove_sds(self, sds_id):
        self._command(CMD_REMOVE_SDS, sds_id)

    def add_volume(self, volume_id, inode, size_bytes, *, read_only, capability, iops_limit=0, bandwidth_limit_bytes=0):
        _check_capability(capability)
        self._command(CMD_ADD_VOLUME, bool(read_only), volume_id, 0, 0,
                      _volume_bytes(inode, size_bytes, iops_limit, bandwidth_limit_bytes) + capability)

    def set_volume(self, volume_id, size_bytes, *, read_only, iops_limit=0, bandwidth_limit_bytes=0):
        self._command(CMD_SET_VOLUME, bool(read_only), volume_id, 0, 0,
                      _volume_bytes(0, size_bytes, iops_limit, bandwidth_limit_bytes))

    def set_capability(self, volume_id, capability):
        _check_capability(capability)
        self._command(CMD_SET_CAPABILITY, 0, volume_id, 0, 0, capability)

    def remove_volume(self, volume_id):
        self._command(CMD_REMOVE_VOLUME, 0, volume_id)

    def set_segment(self, volume_id, segment_index, entries):
        if len(entries) % 12 or len(entries) > 12288:
            raise ValueError(f"a segment of {len(entries)} bytes")
        self._command(CMD_SET_SEGMENT, 0, volume_id, segment_index, 0, bytes(entries))

    def submit(self, token, kind, volume_id, offset, length=0, data=b""):
        if not 0 <= token < 1 << 56:
            raise ValueError(f"token {token}")
        number = _KINDS[kind]
        payload = None
        if number == REQ_WRITE:
            payload = bytes(data)
            length = len(payload)
        elif number == REQ_DISCARD:
            payload = struct.pack("=Q", length)
            length = 0
        if length > IO_SIZE_MAX:
            raise ValueError(f"{length} bytes in one IO, at most {IO_SIZE_MAX}")
        self._command(CMD_SUBMIT, length, volume_id, token << 8 | number, offset, payload)

    def bench(self, volume_id, kind, block_size, depth, seconds, span):
        number, sequential = _BENCH_KINDS[kind]
        if not 0 < block_size <= IO_SIZE_MAX or not 0 < depth <= DEPTH_MAX or span < block_size:
            raise ValueError("block size, depth or span out of range")
        self._command(CMD_BENCH, 0, volume_id, 0, 0,
                      struct.pack("=QQQIBB2x", block_size, int(seconds * 1e9), span, depth, number, sequential))

    def invalidate(self, message):
        self._command(CMD_INVALIDATE, 0, 0, 0, 0, bytes(message))

    def events(self):
        cdef Message m
        out = []
        ring_retry(&self.engine.commands)
        ring_clear(&self.engine.events)
        while ring_pop(&self.engine.events, &m):
            data = m.data[:m.size] if m.data != NULL else b""
            free(m.data)
            out.append(_event(m.kind, m.a, m.b, m.c, m.d, data))
        return out

    def stats(self):
        cdef Engine* e = &self.engine
        ring_retry(&e.commands)
        return {
            "sds": {e.sds[i].id: _sds_stats(e.sds[i]) for i in range(e.sds_count)},
            "volumes": {e.volumes[i].id: _volume_stats(e.volumes[i]) for i in range(e.volume_count)},
            "in_flight": e.request_count,
            "in_flight_bytes": e.request_bytes,
            "parked": e.parked,
            "resent": e.resent,
            "buffer_bytes": e.pool.bytes_out,
            "relayed": e.channel.relayed,
            "fuse_requests": e.channel.requests,
            "fuse_reply_errors": e.channel.reply_errors,
        }


cdef dict _sds_stats(const Sds* s):
    return {
        "connected": bool(s.connected),
        "in_flight": s.in_flight_count,
        "latency_ns": s.latency_ns,
        "bytes": s.bytes_in + s.conn.bytes_in + s.bytes_out + s.conn.bytes_out,
    }


cdef dict _volume_stats(const Volume* v):
    return {
        "read_ops": v.read_ops,
        "read_bytes": v.read_bytes,
        "read_ns": v.read_latency.total_ns,
        "write_ops": v.write_ops,
        "write_bytes": v.write_bytes,
        "write_ns": v.write_latency.total_ns,
        "flush_ops": v.flush_ops,
        "flush_ns": v.flush_ns,
        "discard_ops": v.discard_ops,
        "discard_bytes": v.discard_bytes,
        "seek_ops": v.seek_ops,
        "errors": v.errors,
        "checksum_errors": v.checksum_errors,
        "read_histogram": hist_list(&v.read_latency),
        "write_histogram": hist_list(&v.write_latency),
    }


def _check_capability(capability):
    if len(capability) > CAPABILITY_MAX:
        raise ValueError(f"a capability of {len(capability)} bytes")


def _volume_bytes(inode, size_bytes, iops_limit, bandwidth_limit_bytes):
    return struct.pack("=QQQQ", inode, size_bytes, iops_limit, bandwidth_limit_bytes)


def _event(kind, a, b, c, d, data):
    if kind == EV_SDS_CLOSED:
        return ("sds_closed", a, _close_reason(b - (1 << 64) if b >> 63 else b))
    if kind == EV_SDS_NEEDED:
        return ("sds_needed", a)
    if kind == EV_MAP_MISS:
        return ("map_miss", b, c)
    if kind == EV_STALE_MAP:
        return ("stale_map", b, c)
    if kind == EV_CAPABILITY_REFUSED:
        return ("capability_refused", b, a, c)
    if kind == EV_UNMOUNTED:
        return ("unmounted",)
    if kind == EV_RELAY_CLOSED:
        return ("relay_closed",)
    if kind == EV_PAST_END:
        return ("past_end", b)
    if kind == EV_FORCED:
        return ("forced", b, a)
    if kind == EV_COMPLETED:
        return ("completed", b, a, data)
    if kind == EV_IO_ERROR:
        return ("io_error", b, c, f"offset {d}: {_REASONS.get(a, errno_module.errorcode.get(c, str(c)))}")
    if kind == EV_CHECKSUM_ERROR:
        return ("checksum_error", b, c, a)
    raise AssertionError(f"event {kind}")
