"""Parts on their way between the SDC engine and the SDSs.

Owns the connections and the waiting places of parts: an SDS's queue, a volume's map queue, the back-off list. The
engine's thread runs every function. Promises that a part is in exactly one place at any time; that it keeps its
operation id however often it is sent; that a part whose answer no longer matters stays known until that answer or the
end of the connection, so that no answer is ever taken for another's; and that an SDS can neither crash the engine nor
have wrong bytes accepted: what does not verify is asked for elsewhere, what does not fit closes the connection.
"""

from libc.errno cimport EIO, ENODEV, ENOMEM, ENOSPC, EROFS, errno
from posix.fcntl cimport F_GETFL, F_SETFL, O_NONBLOCK, fcntl
from posix.unistd cimport close
from datapath.checksum cimport verify_range
from datapath.connection cimport Buf, Conn, conn_destroy, conn_flush, conn_init, conn_receive
from datapath.sdcflush cimport flush_heard
from datapath.sdcmove cimport flush_spared
from datapath.sdcsend cimport send_capability, send_doubt, send_part, send_queue
from datapath.sdcstate cimport *
from datapath.volumemap cimport MapEntry, map_lookup
from datapath.waiting cimport EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLLIN, EPOLLOUT, epoll_ctl, epoll_event
from datapath.wire cimport *

cdef extern from "sys/socket.h" nogil:
    int setsockopt(int fd, int level, int name, const void* value, unsigned int size)

cdef extern from "netinet/in.h" nogil:
    int IPPROTO_TCP

cdef extern from "netinet/tcp.h" nogil:
    int TCP_NODELAY

cdef enum:
    BACKOFF_FIRST_NS = 5000000
    BACKOFF_MAX_NS = 100000000
    BACKOFF_DOUBLINGS = 5
    PAYLOAD_TRIES_MAX = 5
    BAD_TRIES_MAX = 3
    EXPLORE_EVERY = 64               # reads between two that try the slower copy
    OWES_NS = 20000000               # an answer due for longer says more than the latency of those before
    LATENCY_SCALE_BYTES = 16384      # a read of this many bytes counts for half its time


# -- waiting places

cdef inline void _park(Engine* e, Part* p, Link* place, int state) noexcept nogil:
    p.state = <uint8_t>state
    list_append(place, &p.link)
    e.parked += 1


cdef void part_detach(Engine* e, Part* p) noexcept nogil:
    """Takes the part out of the place where it is (state 0: at most the local list of a caller further up)."""
    list_remove(&p.link)
    if p.state == PART_SENT:
        p.sds.in_flight_count -= 1
    elif p.state != 0:
        e.parked -= 1
    p.state = 0


cdef void part_cancel(Engine* e, Part* p) noexcept nogil:
    p.request = NULL
    if p.state == PART_SENT:
        p.abandoned = True
        return
    part_detach(e, p)
    part_free(e, p)


cdef void part_back_off(Engine* e, Part* p) noexcept nogil:
    cdef uint64_t delay = <uint64_t>BACKOFF_FIRST_NS << min(p.tries, <uint8_t>BACKOFF_DOUBLINGS)
    if p.tries < 255:
        p.tries += 1
    p.retry_ns = e.now_ns + min(delay, <uint64_t>BACKOFF_MAX_NS)
    if e.backoff_ns == 0 or p.retry_ns < e.backoff_ns:
        e.backoff_ns = p.retry_ns
    _park(e, p, &e.backoff, PART_BACKS_OFF)


cdef void link_run_backoff(Engine* e) noexcept nogil:
    cdef Link all
    cdef Part* p
    if e.backoff_ns == 0 or e.backoff_ns > e.now_ns:
        return
    list_init(&all)
    list_take_all(&e.backoff, &all)
    e.backoff_ns = 0
    while not list_empty(&all):
        p = <Part*>all.next
        list_remove(&p.link)
        if p.retry_ns > e.now_ns:
            list_append(&e.backoff, &p.link)
            if e.backoff_ns == 0 or p.retry_ns < e.backoff_ns:
                e.backoff_ns = p.retry_ns
            continue
        e.parked -= 1
        p.state = 0
        p.later = 0
        p.stale = False
        part_route(e, p)


cdef void _ask(Engine* e, Volume* v, uint32_t segment, uint32_t event) noexcept nogil:
    """Has trio fetch a segment of the map, unless it has already been asked to."""
    cdef uint32_t byte = segment >> 3
    cdef uint8_t bit = <uint8_t>(1 << (segment & 7))
    if byte < v.asked_bytes:
        if v.asked[byte] & bit:
            return
        v.asked[byte] |= bit
    emit(e, event, 0, v.id, segment, 0, NULL, 0)


cdef void link_need(Engine* e, Sds* s) noexcept nogil:
    if not s.told:
        s.told = True
        emit(e, EV_SDS_NEEDED, s.id, 0, 0, 0, NULL, 0)


# -- choosing an SDS

cdef inline uint64_t _cost(const Engine* e, const Sds* s) noexcept nogil:
    """What a read would cost there: its latency, or for how long it owes an answer, times those that wait."""
    cdef uint64_t age = 0 if list_empty(&s.in_flight) else e.now_ns - (<const Part*>s.in_flight.next).sent_ns
    return ((age if age > OWES_NS else s.latency_ns) + 1) * (s.in_flight_count + 1)


cdef Sds* _reader(Engine* e, Part* p, Sds* first, Sds* second) noexcept nogil:
    """The copy to read from, NULL when none is left to ask (then all are in bad or later)."""
    cdef uint8_t out = p.bad | p.later
    cdef Sds* only
    if second == NULL or out:
        if out & 1 and (second == NULL or out & 2):
            return NULL
        only = second if out & 1 else first
        if p.later and not only.connected:
            link_need(e, only)           # until it is there the one that asked to come again may be ready
            return NULL
        return only
    if not first.connected or not second.connected:
        # The missing one is wanted in any case: alone, the other carries all.
        if not first.connected:
            link_need(e, first)
        if not second.connected:
            link_need(e, second)
        return first if first.connected or not second.connected else second
    if _cost(e, second) < _cost(e, first):
        first, second = second, first
    e.reads += 1
    if e.reads % EXPLORE_EVERY == 0 and second.in_flight_count == 0:
        return second
    return first


cdef void part_route(Engine* e, Part* p) noexcept nogil:
    cdef Volume* v = p.volume
    cdef const MapEntry* entry
    cdef Sds* primary
    cdef Sds* secondary = NULL
    cdef Sds* target
    if p.opcode == OP_CAPABILITY:
        part_free(e, p)              # presented anew by whoever needs it
        return
    if p.opcode == OP_FLUSH:
        _route_flush(e, p)
        return
    entry = map_lookup(v.map, p.chunk)
    if entry == NULL:
        _park(e, p, &v.map_wait, PART_WAITS_MAP)
        _ask(e, v, p.chunk >> 10, EV_MAP_MISS)
        return
    if entry.primary == 0 or (p.stale and entry.epoch <= p.stale_epoch):
        _park(e, p, &v.map_wait, PART_WAITS_MAP)
        _ask(e, v, p.chunk >> 10, EV_STALE_MAP)
        return
    if entry.epoch != p.epoch:
        p.bad = 0                    # other members, or the same ones after a repair
        p.later = 0
    primary = sds_get(e, entry.primary)
    if entry.secondary:
        secondary = sds_get(e, entry.secondary)
    if primary == NULL or (entry.secondary and secondary == NULL):
        e.part_done(e, p, EIO, WHY_BAD_REQUEST, NULL, NULL)
        return
    if entry.epoch != p.epoch or p.since == 0:
        p.since = e.happened
    p.epoch = entry.epoch
    p.primary = entry.primary
    p.secondary = entry.secondary
    if p.opcode == OP_READ or p.opcode == OP_SEEK:
        target = _reader(e, p, primary, secondary)
        if target == NULL:
            _no_reader(e, p, 3 if secondary != NULL else 1)
            return
    else:
        target = primary
        if secondary != NULL and not secondary.connected:
            link_need(e, secondary)      # a flush will have to reach it too
        p.secondary_incarnation = secondary.durable_incarnation if secondary != NULL else 0
    _to_sds(e, p, target)


cdef void _no_reader(Engine* e, Part* p, uint8_t members) noexcept nogil:
    if p.bad & members == members:
        e.part_done(e, p, EIO, WHY_COPIES, NULL, NULL)
    else:
        part_back_off(e, p)


cdef void _route_flush(Engine* e, Part* p) noexcept nogil:
    if not p.sds.connected:
        link_need(e, p.sds)
    if flush_spared(e, p):
        e.part_done(e, p, EIO, WHY_FLUSH_LOST, NULL, NULL)
    elif p.sds.connected:
        _to_sds(e, p, p.sds)
    else:
        part_back_off(e, p)


cdef void _to_sds(Engine* e, Part* p, Sds* s) noexcept nogil:
    cdef Volume* v = p.volume
    cdef uint8_t* cap = &v.caps[s.index]
    p.sds = s
    if not s.connected:
        link_need(e, s)
    elif cap[0] == CAP_GRANTED:
        if s.in_flight_count >= SDS_IN_FLIGHT_MAX or s.conn.out_bytes >= SDS_OUT_BYTES_MAX:
            s.congested = True
        elif send_part(e, p, s) < 0:
            part_back_off(e, p)
            return
        else:
            return
    elif cap[0] == CAP_NONE:
        _present(e, v, s)
        if cap[0] == CAP_NONE:       # no memory for it
            part_back_off(e, p)
            return
    _park(e, p, &s.waiting, PART_WAITS_SDS)


# -- capabilities

cdef void _present(Engine* e, Volume* v, Sds* s) noexcept nogil:
    """Shows the volume's capability to the SDS; its state stays as it is when there is no memory for that."""
    if v.capability_size == 0:
        _refused(e, v, s, ST_NOT_AUTHORIZED)
    elif send_capability(e, v, s) == 0 and v.caps[s.index] != CAP_GRANTED:
        v.caps[s.index] = CAP_ASKED


cdef void _refused(Engine* e, Volume* v, Sds* s, int status) noexcept nogil:
    if v.caps[s.index] != CAP_REFUSED:
        v.caps[s.index] = CAP_REFUSED
        emit(e, EV_CAPABILITY_REFUSED, s.id, v.id, <uint64_t>status, 0, NULL, 0)


cdef void _release(Engine* e, Sds* s, Volume* v) noexcept nogil:
    """Parts that waited at the SDS go on: those of one volume, or all (v NULL)."""
    cdef Link all
    cdef Part* p
    list_init(&all)
    list_take_all(&s.waiting, &all)
    while not list_empty(&all):
        p = <Part*>all.next
        list_remove(&p.link)
        if v == NULL or p.volume == v:
            e.parked -= 1
            p.state = 0
            part_route(e, p)
        else:
            list_append(&s.waiting, &p.link)


cdef void link_capability_changed(Engine* e, Volume* v) noexcept nogil:
    cdef uint32_t i
    for i in range(e.sds_count):
        if not e.sds[i].connected:
            continue
        if v.caps[i] == CAP_REFUSED:
            v.caps[i] = CAP_NONE
            _release(e, e.sds[i], v)
        elif v.caps[i] == CAP_GRANTED:
            _present(e, v, e.sds[i])         # the old one serves until the new one is accepted


# -- connections

cdef void link_attach(Engine* e, uint32_t sds_id, int fd, uint64_t durable_incarnation) noexcept nogil:
    cdef Sds* s = sds_get(e, sds_id)
    cdef epoll_event event
    cdef int one = 1
    if s == NULL:
        close(fd)
        return
    s.told = True                    # parts that lose their connection need not ask for the one that is here
    link_drop(e, s, 0, False)
    if conn_init(&s.conn, &e.pool, fd, s.id) < 0:
        close(fd)
        emit(e, EV_SDS_CLOSED, s.id, ENOMEM, 0, 0, NULL, 0)
        return
    s.conn.user = s
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK)
    event.events = EPOLLIN
    event.data.u64 = s.index
    if epoll_ctl(e.epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0:
        emit(e, EV_SDS_CLOSED, s.id, <uint64_t>errno, 0, 0, NULL, 0)
        conn_destroy(&s.conn, &e.pool)
        return
    s.connected = True
    s.told = False
    s.congested = False
    flush_heard(e, s.durable_incarnation, durable_incarnation)
    s.durable_incarnation = durable_incarnation
    s.latency_ns = 0
    _release(e, s, NULL)
    # Flushes look again at once.
    e.backoff_ns = e.now_ns if not list_empty(&e.backoff) else 0
    _wake_flushes(e, s)


cdef void _wake_flushes(Engine* e, Sds* s) noexcept nogil:
    cdef Link* link = e.backoff.next
    while link != &e.backoff:
        if (<Part*>link).opcode == OP_FLUSH and (<Part*>link).sds == s:
            (<Part*>link).retry_ns = e.now_ns
        link = link.next


cdef void link_drop(Engine* e, Sds* s, int error, bint tell) noexcept nogil:
    cdef Link all
    cdef Part* p
    cdef uint32_t i
    if not s.connected:
        return
    s.connected = False
    s.closed_ns = e.now_ns
    s.bytes_in += s.conn.bytes_in
    s.bytes_out += s.conn.bytes_out
    conn_destroy(&s.conn, &e.pool)
    s.conn.bytes_in = 0
    s.conn.bytes_out = 0
    if tell:
        s.told = True
        emit(e, EV_SDS_CLOSED, s.id, <uint64_t><int64_t>error, 0, 0, NULL, 0)
    for i in range(e.volume_count):
        e.volumes[i].caps[s.index] = CAP_NONE
    list_init(&all)
    list_take_all(&s.in_flight, &all)
    s.in_flight_count = 0
    while not list_empty(&all):
        p = <Part*>all.next
        list_remove(&p.link)
        p.state = 0
        if p.abandoned:
            part_free(e, p)
        else:
            part_route(e, p)
    _release(e, s, NULL)


cdef void link_receive(Engine* e, Sds* s) noexcept nogil:
    if s.connected and conn_receive(&s.conn, &e.pool, _frame, <void*>e) < 0:
        link_drop(e, s, s.conn.error, True)


cdef void _flush_one(Engine* e, Sds* s) noexcept nogil:
    cdef epoll_event event
    cdef int result
    if not s.connected:
        return
    result = conn_flush(&s.conn, &e.pool)
    if result < 0:
        link_drop(e, s, s.conn.error, True)
        return
    if (result == 1) != s.conn.want_write:
        s.conn.want_write = result == 1
        event.events = EPOLLIN | (EPOLLOUT if s.conn.want_write else 0)
        event.data.u64 = s.index
        epoll_ctl(e.epoll_fd, EPOLL_CTL_MOD, s.conn.fd, &event)
    if s.congested and s.in_flight_count < SDS_IN_FLIGHT_MAX // 2 and s.conn.out_bytes < SDS_OUT_BYTES_MAX // 2:
        s.congested = False
        _release(e, s, NULL)


cdef void link_flush(Engine* e) noexcept nogil:
    cdef Sds* s
    # The list may grow meanwhile: a connection that fails sends its parts elsewhere.
    while e.to_flush_count:
        e.to_flush_count -= 1
        s = e.to_flush[e.to_flush_count]
        s.queued = False
        _flush_one(e, s)


cdef void link_writable(Engine* e, Sds* s) noexcept nogil:
    if s.connected:
        send_queue(e, s)


# -- answers

cdef int _frame(void* context, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil:
    """One answer of an SDS. Non-zero closes the connection."""
    cdef Engine* e = <Engine*>context
    cdef Sds* s = <Sds*>c.user
    cdef Part* p = part_find(e, h.request_id)
    if p == NULL or p.sds != s:
        return LINK_UNKNOWN_REQUEST
    if h.opcode != (p.opcode | OP_REPLY) or h.volume_id != p.volume.id or h.chunk_index != p.chunk:
        return LINK_MISMATCH
    if p.opcode == OP_READ and h.status == ST_OK and (h.offset != p.offset or h.length != p.length):
        return LINK_MISMATCH
    part_detach(e, p)
    if s.congested:
        send_queue(e, s)
    if p.abandoned:
        part_free(e, p)
    elif p.opcode == OP_CAPABILITY:
        _capability_answer(e, p, s, h.status)
    elif h.status == ST_OK:
        _ok(e, p, s, h, body)
    else:
        _not_ok(e, p, s, h.status)
    return 0


cdef void _capability_answer(Engine* e, Part* p, Sds* s, int status) noexcept nogil:
    cdef Volume* v = p.volume
    cdef bint outdated = p.capability_version != v.capability_version
    part_free(e, p)
    if status == ST_OK and not outdated:
        v.caps[s.index] = CAP_GRANTED
        _release(e, s, v)
        return
    if outdated:
        # Parts wait and a newer capability is there, unless it has been presented meanwhile.
        if v.caps[s.index] == CAP_ASKED:
            v.caps[s.index] = CAP_NONE
            _present(e, v, s)
        return
    if status == ST_NOT_AUTHORIZED or status == ST_READ_ONLY or status == ST_NO_VOLUME:
        _refused(e, v, s, status)
        return
    # The SDS cannot say yet: parts come back with their back-off and present it again.
    v.caps[s.index] = CAP_NONE
    _delay_waiting(e, s, v)


cdef void _delay_waiting(Engine* e, Sds* s, Volume* v) noexcept nogil:
    cdef Link* link = s.waiting.next
    cdef Link* following
    while link != &s.waiting:
        following = link.next
        if (<Part*>link).volume == v:
            part_detach(e, <Part*>link)
            part_back_off(e, <Part*>link)
        link = following


cdef void _ok(Engine* e, Part* p, Sds* s, Header* h, char* body) noexcept nogil:
    cdef char* payload = body
    cdef uint64_t elapsed
    if p.opcode == OP_READ:
        if h.flags & (FLAG_ZEROS | FLAG_ABSENT):
            payload = e.zeros
        else:
            payload = body + 4 * blocks_touched(p.offset, p.length)
            if verify_range(p.volume.id, p.chunk, p.offset, p.length, payload, <const uint32_t*>body) >= 0:
                send_doubt(e, p, s)
                _bad_copy(e, p, s)
                return
        elapsed = (e.now_ns - p.sent_ns) * LATENCY_SCALE_BYTES // (LATENCY_SCALE_BYTES + p.length)
        s.latency_ns = (s.latency_ns * 7 + elapsed) // 8 if s.latency_ns else elapsed
    e.part_done(e, p, 0, 0, h, payload)


cdef void _bad_copy(Engine* e, Part* p, Sds* s) noexcept nogil:
    """The SDS's copy does not verify: the other one is asked."""
    p.volume.checksum_errors += 1
    emit(e, EV_CHECKSUM_ERROR, s.id, p.volume.id, p.chunk, 0, NULL, 0)
    part_exclude(p, s, True)
    _route_or_fail(e, p, WHY_CHECKSUM)


cdef void part_exclude(Part* p, Sds* s, bint for_good) noexcept nogil:
    cdef uint8_t bit = 1 if s.id == p.primary else 2
    if for_good:
        p.bad |= bit
    else:
        p.later |= bit


cdef void _route_or_fail(Engine* e, Part* p, int reason) noexcept nogil:
    cdef uint8_t members = 3 if p.secondary else 1
    if p.bad & members != members:
        part_route(e, p)
    elif p.opcode == OP_READ and reason == WHY_CHECKSUM and p.bad_tries < BAD_TRIES_MAX:
        p.bad_tries += 1                     # each may lack another block, and give it to the other
        p.bad = 0
        part_back_off(e, p)
    else:
        e.part_done(e, p, EIO, reason, NULL, NULL)


cdef void _not_ok(Engine* e, Part* p, Sds* s, int status) noexcept nogil:
    cdef bint reads = p.opcode == OP_READ or p.opcode == OP_SEEK
    if status == ST_STALE_MAP or status == ST_NOT_MEMBER:
        _stale(e, p)
    elif status == ST_NOT_READY or status == ST_BUSY or status == ST_SHUTTING_DOWN or status == ST_RANGE:
        # RANGE: an extend has not reached the SDS yet (it may be cut off from the MDM).
        if reads:
            part_exclude(p, s, False)
            part_route(e, p)
        else:
            part_back_off(e, p)
    elif status == ST_NOT_AUTHORIZED:
        _refused(e, p.volume, s, status)
        p.sds = s
        _park(e, p, &s.waiting, PART_WAITS_SDS)
    elif status == ST_CHECKSUM and reads:
        _bad_copy(e, p, s)
    elif status == ST_IO_ERROR and reads:
        part_exclude(p, s, True)
        _route_or_fail(e, p, WHY_COPIES)
    elif status == ST_PAYLOAD and p.payload_tries < PAYLOAD_TRIES_MAX:
        p.payload_tries += 1
        part_route(e, p)
    else:
        _fail_with(e, p, status)


cdef void _stale(Engine* e, Part* p) noexcept nogil:
    cdef const MapEntry* entry
    if p.opcode == OP_FLUSH:
        part_back_off(e, p)
        return
    entry = map_lookup(p.volume.map, p.chunk)
    if entry != NULL and entry.epoch > p.epoch:
        part_route(e, p)             # a newer map has come since it was sent
        return
    p.stale = True
    p.stale_epoch = p.epoch
    _park(e, p, &p.volume.map_wait, PART_WAITS_MAP)
    _ask(e, p.volume, p.chunk >> 10, EV_STALE_MAP)


cdef void _fail_with(Engine* e, Part* p, int status) noexcept nogil:
    cdef int error = EIO
    cdef int reason = WHY_DISK
    if status == ST_NO_SPACE:
        error = ENOSPC
        reason = WHY_SPACE
    elif status == ST_READ_ONLY:
        error = EROFS
        reason = WHY_NONE
    elif status == ST_NO_VOLUME:
        error = ENODEV
        reason = WHY_NONE
    elif status == ST_CHECKSUM:
        reason = WHY_CHECKSUM
    elif status == ST_PAYLOAD:
        reason = WHY_PAYLOAD
    elif status == ST_OLD_SESSION:
        reason = WHY_OLD_SESSION
    elif status == ST_BAD_REQUEST:
        reason = WHY_BAD_REQUEST
    e.part_done(e, p, error, reason, NULL, NULL)
