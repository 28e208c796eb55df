"""Flushes of the SDC engine: when "it is on disk" is true.

Owns the flush requests' members and the verdict. The engine's thread runs every function. What may be believed:

- An SDS *has kept* a pair's writes when it has the durable incarnation that it had at the first of them, and says that
  all it acknowledged is on its disks.
- If it has also been in the in-sync sets of these chunks since then, its word is enough: its copies are among those
  that the others are made from.
- If it has been out of one meanwhile, its copy may have been replaced by that of an SDS that was alone and lost its
  memory. Then all of the pair must have kept their writes, and no SDS that we know may have lost its memory since. (Of
  one that we had not been connected to before the write we do not know what it had; it is only believed like that.)
- When an operator has forced an older copy to serve (the entry's epoch is of another era), nobody can vouch for what
  was written before. What the SDS that had it says is true and worth nothing: its copy is made the older one.
- Who joins a set has the writes in its memory only. So it is asked too: the new pair counts as written to.

A pair whose members have all been out, and one of them for good, could vouch no more for what is safe elsewhere. So the
engine flushes by itself, soon after the sets have changed or an SDS was connected for the first time; only what it was
told is true ends what is dirty.
"""

from libc.errno cimport EIO, ENODEV, ENOMEM
from libc.stdlib cimport calloc
from libc.string cimport memcpy, memset
from datapath.flushset cimport (
    LEFT_PRIMARY, LEFT_SECONDARY, Gone, flushset_begin, flushset_end, flushset_note, gone_note, pairs_left)
from datapath.sdclink cimport link_need, part_route
from datapath.sdcrequest cimport request_cancel, request_finish, request_link
from datapath.sdcstate cimport *
from datapath.volumemap cimport MAP_ERA_BITS, MAP_SEGMENT_SIZE, MapEntry, map_lookup, map_segment_set
from datapath.wire cimport OP_FLUSH

cdef enum:
    ENTRIES = 1024                   # of a segment
    TIDY_NS = 1000000000             # the sets have not changed for so long, or
    TIDY_BY_NS = 10000000000         # changed first so long ago: the volume is flushed


cdef void flush_begin(Engine* e, Request* r) noexcept nogil:
    cdef int count = flushset_begin(&r.volume.dirty, &r.pairs, &r.flush_mark)
    cdef uint32_t i
    if count <= 0:
        r.error = ENOMEM if count < 0 else 0
        request_finish(e, r)
        return
    r.pair_count = <uint32_t>count
    r.members = <FlushMember*>calloc(2 * r.pair_count, sizeof(FlushMember))
    if r.members == NULL:
        r.error = ENOMEM
        request_finish(e, r)
        return
    for i in range(r.pair_count):
        _add(e, r, r.pairs[i].primary)
        if r.pairs[i].secondary:
            _add(e, r, r.pairs[i].secondary)
    _send(e, r)


cdef FlushMember* _find(const Request* r, uint16_t sds_id) noexcept nogil:
    cdef uint32_t i
    for i in range(r.member_count):
        if r.members[i].sds.id == sds_id:
            return &r.members[i]
    return NULL


cdef void _add(Engine* e, Request* r, uint16_t sds_id) noexcept nogil:
    cdef Sds* s = sds_get(e, sds_id)
    if s != NULL and _find(r, sds_id) == NULL:
        r.members[r.member_count].sds = s
        r.members[r.member_count].due = True
        r.member_count += 1


cdef void _send(Engine* e, Request* r) noexcept nogil:
    cdef Part* p
    cdef uint32_t i
    r.pumping = True
    for i in range(r.member_count):
        if not r.members[i].due:
            continue
        p = part_new(e)
        if p == NULL:
            r.error = ENOMEM
            break
        p.opcode = OP_FLUSH
        request_link(e, r, p)
        p.sds = r.members[i].sds
        p.position = i
        r.members[i].due = False
        part_route(e, p)
    r.pumping = False
    if r.error:
        request_cancel(e, r)
    if r.live == 0:
        _verdict(e, r)


cdef void flush_member(Engine* e, Request* r, Part* p, int error, int reason, const Header* h) noexcept nogil:
    """One SDS has answered, or is known not to."""
    cdef FlushMember* m = &r.members[p.position]
    m.good = error == 0
    m.spared = reason == WHY_FLUSH_LOST
    if m.good:
        m.incarnation = h.incarnation
    if error == ENODEV:
        r.error = ENODEV
    if r.live == 0 and not r.pumping:
        _verdict(e, r)


cdef inline bint _kept(const Request* r, uint16_t sds_id, uint64_t incarnation) noexcept nogil:
    """The SDS has on its disks what it acknowledged while its durable incarnation was this."""
    cdef FlushMember* m
    if sds_id == 0 or incarnation == 0:
        return False
    m = _find(r, sds_id)
    return m != NULL and m.good and m.incarnation == incarnation


cdef inline bint _may_have_kept(const Request* r, uint16_t sds_id, uint64_t incarnation) noexcept nogil:
    """Or it was not known then, which says nothing against it."""
    cdef FlushMember* m = _find(r, sds_id)
    return m != NULL and m.good and (incarnation == 0 or m.incarnation == incarnation)


cdef inline bint _stayed(const DirtyPair* pair, uint16_t sds_id) noexcept nogil:
    return not pair.left & (LEFT_PRIMARY if sds_id == pair.primary else LEFT_SECONDARY)


cdef bint _safe(Engine* e, const Request* r, const DirtyPair* pair) noexcept nogil:
    if r.volume.forced_at > pair.since:
        return False
    if _kept(r, pair.primary, pair.primary_incarnation) and _stayed(pair, pair.primary):
        return True
    if _kept(r, pair.secondary, pair.secondary_incarnation) and _stayed(pair, pair.secondary):
        return True
    return (e.lost_at <= pair.since and _may_have_kept(r, pair.primary, pair.primary_incarnation)
            and (pair.secondary == 0 or _may_have_kept(r, pair.secondary, pair.secondary_incarnation)))


cdef int flush_spares(Engine* e, Part* p) noexcept nogil:
    cdef const Request* r = p.request
    cdef uint16_t sds_id = p.sds.id
    cdef const DirtyPair* pair
    cdef uint16_t other
    cdef uint64_t incarnation
    cdef uint32_t i
    cdef int result = SPARES_NOW
    for i in range(r.pair_count):
        pair = &r.pairs[i]
        if r.volume.forced_at > pair.since:
            continue                 # nobody can vouch for it
        if pair.primary == sds_id:
            other = pair.secondary
            incarnation = pair.secondary_incarnation
        elif pair.secondary == sds_id:
            other = pair.primary
            incarnation = pair.primary_incarnation
        else:
            continue
        if not _kept(r, other, incarnation) or not _stayed(pair, other):
            return SPARES_NOT
        if _stayed(pair, sds_id):
            result = SPARES_LATER    # a member as far as we know: two disks are better than one
    return result


cdef bint _take_back(Request* r, uint16_t sds_id) noexcept nogil:
    """Who vouched for it has left the sets meanwhile: it has to be waited for after all. False if it was not spared."""
    cdef FlushMember* m = _find(r, sds_id)
    if m == NULL or not m.spared:
        return False
    m.spared = False
    m.due = True
    return True


cdef void _verdict(Engine* e, Request* r) noexcept nogil:
    cdef uint32_t i
    cdef bint again = False
    if r.error == 0:
        for i in range(r.pair_count):
            if _safe(e, r, &r.pairs[i]):
                continue
            if r.volume.forced_at <= r.pairs[i].since:     # else nobody can vouch for it, and waiting changes nothing
                again |= _take_back(r, r.pairs[i].primary)
                again |= _take_back(r, r.pairs[i].secondary)
            if not again:
                r.error = EIO
                r.reason = WHY_FLUSH_LOST
                break
        if again:
            _send(e, r)              # nobody vouches for these now, so none of them is spared at once
            return
        # Told once, as the kernel does for a disk: what was lost stays lost, later writes are judged by themselves. But
        # it has to be told to somebody.
        if r.error == 0 or r.source != FROM_ENGINE:
            flushset_end(&r.volume.dirty, r.pairs, r.pair_count, r.flush_mark)
    request_finish(e, r)


# -- what happens to those that are to vouch

cdef inline bint _stayed_in(const MapEntry* entry, uint32_t changes, uint16_t sds_id) noexcept nogil:
    """Whether the SDS surely was in the set all the time, after so many changes of which we may have missed some. Out
    and back as a secondary takes two changes, and to lead again one more."""
    return changes == 0 or (entry.primary == sds_id and changes <= 2) or (entry.secondary == sds_id and changes == 1)


cdef int flush_note(Engine* e, const Part* p, uint64_t incarnation) noexcept nogil:
    cdef const MapEntry* entry = map_lookup(p.volume.map, p.chunk)
    cdef uint8_t left = 0
    if entry == NULL or not _stayed_in(entry, entry.epoch - p.epoch, p.primary):
        left |= LEFT_PRIMARY
    if entry == NULL or not _stayed_in(entry, entry.epoch - p.epoch, p.secondary):
        left |= LEFT_SECONDARY
    return flushset_note(&p.volume.dirty, p.chunk, p.primary, p.secondary, incarnation, p.secondary_incarnation,
                         p.since, left)


cdef void flush_heard(Engine* e, uint64_t before, uint64_t durable_incarnation) noexcept nogil:
    cdef uint32_t i
    if before and before != durable_incarnation:
        e.happened += 1
        e.lost_at = e.happened
    if before == 0:
        for i in range(e.volume_count):
            _tidy_soon(e, e.volumes[i])


cdef int flush_segment_set(Engine* e, Volume* v, uint32_t segment, const void* entries, uint64_t size) noexcept nogil:
    cdef MapEntry before[ENTRIES]
    cdef Gone gone
    cdef const MapEntry* entry
    cdef bint known = segment < v.map.segment_count and v.map.segments[segment] != NULL
    cdef int result
    cdef uint32_t i
    if known:
        memcpy(before, v.map.segments[segment], MAP_SEGMENT_SIZE)
    result = map_segment_set(v.map, segment, entries, size)
    if not known or result < 0:
        return result
    e.happened += 1
    memset(&gone, 0, sizeof(gone))
    for i in range(ENTRIES):
        entry = &v.map.segments[segment][i]
        if before[i].epoch and entry.epoch > before[i].epoch:
            _who_left(e, v, segment * ENTRIES + i, &before[i], entry, &gone)
    _tell_gone(e, v, &gone)
    for i in range(ENTRIES):
        entry = &v.map.segments[segment][i]
        if v.dirty.count and before[i].epoch and entry.epoch > before[i].epoch and entry.primary and not _same_set(
                &before[i], entry):
            _joined(e, v, segment * ENTRIES + i, entry)
            _tidy_soon(e, v)
    if v.forced_at == e.happened:
        emit(e, EV_FORCED, segment, v.id, 0, 0, NULL, 0)
    return 0


cdef inline bint _same_set(const MapEntry* before, const MapEntry* entry) noexcept nogil:
    return (entry.epoch - before.epoch == 1 and entry.primary == before.primary
            and entry.secondary == before.secondary)


cdef void _who_left(Engine* e, Volume* v, uint32_t chunk, const MapEntry* before, const MapEntry* entry,
                    Gone* gone) noexcept nogil:
    cdef uint32_t changes = entry.epoch - before.epoch
    if entry.epoch >> MAP_ERA_BITS != before.epoch >> MAP_ERA_BITS:
        v.forced_at = e.happened
    if _same_set(before, entry):
        return
    if not _stayed_in(entry, changes, before.primary):
        _gone(e, v, chunk, before.primary, gone)
    if before.secondary and not _stayed_in(entry, changes, before.secondary):
        _gone(e, v, chunk, before.secondary, gone)


cdef inline void _gone(Engine* e, Volume* v, uint32_t chunk, uint16_t sds_id, Gone* gone) noexcept nogil:
    if not gone_note(gone, chunk, sds_id):
        _tell_gone(e, v, gone)
        gone_note(gone, chunk, sds_id)


cdef void _tell_gone(Engine* e, Volume* v, Gone* gone) noexcept nogil:
    """The pairs that are dirty, and the copies of these that flushes have taken. Once for all that a segment says of
    who has left: there may be thousands of pairs."""
    cdef Link* link = e.active.next
    cdef Request* r
    pairs_left(v.dirty.pairs, v.dirty.capacity, gone)
    while gone.any and link != &e.active:
        r = <Request*>link
        if r.kind == REQ_FLUSH and r.volume == v and r.pairs != NULL:
            pairs_left(r.pairs, r.pair_count, gone)
        link = link.next
    memset(gone, 0, sizeof(Gone))


cdef void _joined(Engine* e, Volume* v, uint32_t chunk, const MapEntry* entry) noexcept nogil:
    cdef Sds* primary = sds_get(e, entry.primary)
    cdef Sds* secondary = sds_get(e, entry.secondary)
    cdef uint64_t first = primary.durable_incarnation if primary != NULL else 0
    cdef uint64_t second = secondary.durable_incarnation if secondary != NULL else 0
    if primary != NULL and not primary.connected:
        link_need(e, primary)
    if secondary != NULL and not secondary.connected:
        link_need(e, secondary)
    # Of whom nothing is known, nothing can be proved; the pairs that wrote are judged in any case.
    if (first or second) and flushset_note(&v.dirty, chunk, entry.primary, entry.secondary, first, second, e.happened,
                                           0) < 0:
        e.lost_at = e.happened       # no memory for it: now only who has stayed is believed


# -- flushes that nobody asked for

cdef void _tidy_soon(Engine* e, Volume* v) noexcept nogil:
    if v.dirty.count == 0:
        return
    if v.tidy_by_ns == 0:
        v.tidy_by_ns = e.now_ns + TIDY_BY_NS
    v.tidy_ns = min(e.now_ns + TIDY_NS, v.tidy_by_ns)
    if e.tidy_ns == 0 or v.tidy_ns < e.tidy_ns:
        e.tidy_ns = v.tidy_ns


cdef void flush_run_tidy(Engine* e) noexcept nogil:
    cdef uint32_t i
    cdef Volume* v
    if e.tidy_ns == 0 or e.tidy_ns > e.now_ns:
        return
    e.tidy_ns = 0
    for i in range(e.volume_count):
        v = e.volumes[i]
        if v.tidy_ns == 0:
            continue
        if v.tidy_ns <= e.now_ns and not v.tidying:
            v.tidy_ns = v.tidy_by_ns = 0
            _tidy(e, v)
        elif e.tidy_ns == 0 or v.tidy_ns < e.tidy_ns:
            e.tidy_ns = max(v.tidy_ns, e.now_ns + TIDY_NS // 10)


cdef void _tidy(Engine* e, Volume* v) noexcept nogil:
    cdef Request* r = NULL if v.removed or v.dirty.count == 0 else request_new(e)
    if r == NULL:
        return
    v.tidying = True
    r.source = FROM_ENGINE
    r.kind = REQ_FLUSH
    r.volume = v
    r.started_ns = e.now_ns
    r.deadline_ns = e.now_ns + e.deadline_ns
    list_append(&e.active, &r.link)
    flush_begin(e, r)


cdef void flush_tidied(Request* r) noexcept nogil:
    r.volume.tidying = False
