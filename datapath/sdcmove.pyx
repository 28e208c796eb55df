"""Parts of the SDC engine that go elsewhere than they were sent: after a new map, or because no answer comes.

Owns nothing: it takes parts out of the places that sdclink keeps, and routes them anew. The engine's thread runs every
function. Promises that what was sent to an SDS that no longer serves, or that is frozen, does not wait for it: a write
goes to the new primary, a read to the other copy, and a flush ends where others vouch. The old part stays in flight,
abandoned, until its answer or the end of its connection.
"""

from libc.errno cimport EIO
from datapath.sdclink cimport part_back_off, part_detach, part_exclude, part_route
from datapath.sdcstate cimport *
from datapath.volumemap cimport MapEntry, map_lookup
from datapath.wire cimport OP_CAPABILITY, OP_FLUSH, OP_READ, OP_SEEK

cdef enum:
    FLUSH_GRACE_NS = 500000000       # an SDS gone for longer does not hold up a flush that its peer answered
    FLUSH_HUNG_NS = 1000000000       # nor one that is there and does not answer
    HEDGE_AFTER_NS = 1000000000      # a read without an answer for that long is asked of the other copy
    HEDGE_CHECK_NS = 250000000
    HEDGES_MAX = 4


# -- the map

cdef inline bint _concerns(const Part* p, const Volume* v, uint32_t segment) noexcept nogil:
    return (p.volume == v and p.chunk >> 10 == segment and not p.abandoned
            and p.opcode != OP_CAPABILITY and p.opcode != OP_FLUSH)


cdef void _collect(Engine* e, Link* source, Link* target, Volume* v, uint32_t segment) noexcept nogil:
    cdef Link* link = source.next
    cdef Link* following
    while link != source:
        following = link.next
        if _concerns(<Part*>link, v, segment):
            part_detach(e, <Part*>link)
            list_append(target, link)
        link = following


cdef void _collect_moved(Engine* e, Link* target, Volume* v, uint32_t segment) noexcept nogil:
    """Parts that back off from members that are others now."""
    cdef Link* link = e.backoff.next
    cdef Link* following
    cdef const MapEntry* entry
    cdef Part* p
    while link != &e.backoff:
        following = link.next
        p = <Part*>link
        if _concerns(p, v, segment):
            entry = map_lookup(v.map, p.chunk)
            if entry != NULL and entry.epoch > p.epoch:
                part_detach(e, p)
                p.tries = 0
                list_append(target, link)
        link = following


cdef void link_segment_changed(Engine* e, Volume* v, uint32_t segment) noexcept nogil:
    cdef Link all
    cdef Part* p
    cdef const MapEntry* entry
    cdef uint32_t i
    if segment >> 3 < v.asked_bytes:
        v.asked[segment >> 3] &= <uint8_t>~(1 << (segment & 7))
    list_init(&all)
    _collect(e, &v.map_wait, &all, v, segment)
    _collect_moved(e, &all, v, segment)
    for i in range(e.sds_count):
        _collect(e, &e.sds[i].waiting, &all, v, segment)
        _resend_misplaced(e, e.sds[i], v, segment)
    while not list_empty(&all):
        p = <Part*>all.next
        list_remove(&p.link)
        entry = map_lookup(v.map, p.chunk)
        if entry != NULL and (entry.primary == 0 or (p.stale and entry.epoch <= p.stale_epoch)):
            # Still the map that was refused, or the SDS itself is behind: look again in a while.
            part_back_off(e, p)
        else:
            p.stale = False
            part_route(e, p)


cdef void _resend_misplaced(Engine* e, Sds* s, Volume* v, uint32_t segment) noexcept nogil:
    """What was sent to an SDS that no longer serves the chunk (it may be frozen) goes to the one that does."""
    cdef Link* link = s.in_flight.next
    cdef Link* end = s.in_flight.prev        # what is sent meanwhile goes behind it
    cdef Link* following
    cdef Part* p
    cdef const MapEntry* entry
    cdef bint last = list_empty(&s.in_flight)
    while not last:
        last = link == end
        following = link.next
        p = <Part*>link
        link = following
        if not _concerns(p, v, segment):
            continue
        entry = map_lookup(v.map, p.chunk)
        if entry == NULL or entry.primary == s.id:
            continue
        if entry.secondary == s.id and (p.opcode == OP_READ or p.opcode == OP_SEEK):
            continue
        p = _supersede(e, p)
        if p != NULL:
            part_route(e, p)


cdef Part* _supersede(Engine* e, Part* p) noexcept nogil:
    """A new part takes over, for the caller to place; the old one stays in flight with nobody waiting. NULL when there
    is no memory: the old one goes on."""
    cdef Part* q = part_new(e)
    cdef Part** from_request
    cdef uint32_t slot, op_place, generation
    if q == NULL:
        return NULL
    slot = q.slot
    op_place = q.op_place
    generation = q.generation
    q[0] = p[0]
    q.slot = slot
    q.generation = generation
    q.state = 0
    list_init(&q.link)
    from_request = &p.request.parts
    while from_request[0] != p:
        from_request = &from_request[0].sibling
    from_request[0] = q
    p.op_place = op_place            # the operation's goes with it
    p.request = NULL
    p.abandoned = True
    return q


# -- no answer

cdef bint flush_spared(Engine* e, Part* p) noexcept nogil:
    """The SDS keeps a flush waiting that its peers vouch for."""
    cdef uint64_t waits = e.now_ns - (p.request.started_ns if p.sds.connected else p.sds.closed_ns)
    if p.sds.connected:
        if waits < HEDGE_CHECK_NS:
            return False
        return e.flush_spares(e, p) >= (SPARES_LATER if waits >= FLUSH_HUNG_NS else SPARES_NOW)
    return e.flush_spares(e, p) >= (SPARES_LATER if waits >= FLUSH_GRACE_NS else SPARES_NOW)


cdef void link_run_hedges(Engine* e) noexcept nogil:
    cdef uint32_t i
    cdef bint any_in_flight = False
    if e.hedge_ns > e.now_ns:
        return
    for i in range(e.sds_count):
        if e.sds[i].in_flight_count or not list_empty(&e.sds[i].waiting):
            any_in_flight = True
            _hedge(e, e.sds[i])
            _spare(e, e.sds[i], &e.sds[i].in_flight)
            _spare(e, e.sds[i], &e.sds[i].waiting)
    e.hedge_ns = e.now_ns + HEDGE_CHECK_NS if any_in_flight else 0


cdef inline bint _other_connected(Engine* e, const Part* p, const Sds* s) noexcept nogil:
    cdef Sds* other = e.sds_by_id[p.secondary if s.id == p.primary else p.primary]
    return other != NULL and other.connected


cdef void _hedge(Engine* e, Sds* s) noexcept nogil:
    cdef Link* link = s.in_flight.next       # in the order sent: the oldest come first
    cdef Part* p
    while link != &s.in_flight:
        p = <Part*>link
        link = link.next
        if e.now_ns - p.sent_ns < HEDGE_AFTER_NS:
            return
        if p.opcode == OP_READ and not p.abandoned and p.hedges < HEDGES_MAX and _other_connected(e, p, s):
            p.hedges += 1
            part_exclude(p, s, False)
            p = _supersede(e, p)
            if p != NULL:
                part_route(e, p)


cdef void _spare(Engine* e, Sds* s, Link* list) noexcept nogil:
    """Flushes of an SDS that does not answer (it may be frozen) end where its peers vouch."""
    cdef Link* link = list.next
    cdef Part* p
    while link != list:
        p = <Part*>link
        link = link.next
        if p.opcode != OP_FLUSH or p.abandoned or not flush_spared(e, p):
            continue
        if p.state == PART_SENT:
            p = _supersede(e, p)
        else:
            part_detach(e, p)
        if p != NULL:
            e.part_done(e, p, EIO, WHY_FLUSH_LOST, NULL, NULL)
