"""The dirty pairs of a volume: what a flush has to reach, and what it must be told to be true.

A write is on a primary and a secondary, each in the page cache of a host. A host that went down since then has a new
durable incarnation. The write survives when one of the two still has the old one and says that all of it is on disk.
So a pair keeps the incarnations of its first write not yet flushed, and a flush compares.

While a flush is under way writes go on. A flush therefore takes a copy with a mark; writes acknowledged after it keep
their incarnations in next_*, and become the first not flushed when that flush (the latest to have taken a copy) is
answered.
"""

from libc.errno cimport ENOMEM
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

cdef enum:
    CAPACITY_FIRST = 16
    MARK_CLEARED = 0x7fffffff        # the entry is about to be taken out


cdef void flushset_init(FlushSet* f) noexcept nogil:
    memset(f, 0, sizeof(FlushSet))


cdef void flushset_destroy(FlushSet* f) noexcept nogil:
    free(f.pairs)
    memset(f, 0, sizeof(FlushSet))


cdef inline uint32_t _home(const FlushSet* f, uint16_t primary, uint16_t secondary, uint8_t group) noexcept nogil:
    cdef uint32_t key = (<uint32_t>primary << 16 | secondary) + group * <uint32_t>0x85ebca6b
    return (key * <uint32_t>2654435769 >> 8) & (f.capacity - 1)


cdef DirtyPair* _find(const FlushSet* f, uint16_t primary, uint16_t secondary, uint8_t group) noexcept nogil:
    """The entry or the free one where it belongs. The engine's thread; capacity is not 0."""
    cdef uint32_t i = _home(f, primary, secondary, group)
    while f.pairs[i].primary and (f.pairs[i].primary != primary or f.pairs[i].secondary != secondary
                                  or f.pairs[i].group != group):
        i = (i + 1) & (f.capacity - 1)
    return &f.pairs[i]


cdef int _resize(FlushSet* f, uint32_t capacity) noexcept nogil:
    cdef FlushSet other = f[0]
    cdef uint32_t i
    other.capacity = capacity
    other.pairs = <DirtyPair*>calloc(capacity, sizeof(DirtyPair))
    if other.pairs == NULL:
        return -ENOMEM
    for i in range(f.capacity):
        if f.pairs[i].primary:
            _find(&other, f.pairs[i].primary, f.pairs[i].secondary, f.pairs[i].group)[0] = f.pairs[i]
    free(f.pairs)
    f[0] = other
    return 0


cdef int flushset_note(FlushSet* f, uint32_t chunk, uint16_t primary, uint16_t secondary, uint64_t primary_incarnation,
                       uint64_t secondary_incarnation, uint64_t since, uint8_t left) noexcept nogil:
    cdef DirtyPair* pair
    if (f.count + 1) * 2 > f.capacity and _resize(f, f.capacity * 2 if f.capacity else CAPACITY_FIRST) < 0:
        return -ENOMEM
    pair = _find(f, primary, secondary, <uint8_t>chunk)
    if pair.primary == 0:
        memset(pair, 0, sizeof(DirtyPair))
        pair.primary = primary
        pair.secondary = secondary
        pair.group = <uint8_t>chunk
        pair.primary_incarnation = primary_incarnation
        pair.secondary_incarnation = secondary_incarnation
        pair.since = since
        pair.left = left
        f.count += 1
    elif pair.mark == 0:
        pair.since = min(pair.since, since)
        pair.left |= left
    elif pair.next_since == 0:
        pair.next_primary = primary_incarnation
        pair.next_secondary = secondary_incarnation
        pair.next_since = since
        pair.next_left = left
    else:
        pair.next_since = min(pair.next_since, since)
        pair.next_left |= left
    return 0


cdef bint gone_note(Gone* gone, uint32_t chunk, uint16_t sds_id) noexcept nogil:
    cdef uint16_t* of_group = gone.sds_ids[<uint8_t>chunk]
    cdef uint32_t i
    gone.any = True
    for i in range(<uint32_t>GONE_MAX):
        if of_group[i] == 0:
            of_group[i] = sds_id
        if of_group[i] == sds_id:
            return True
    return False


cdef void pairs_left(DirtyPair* pairs, uint32_t count, const Gone* gone) noexcept nogil:
    cdef DirtyPair* pair
    cdef const uint16_t* of_group
    cdef uint32_t i, j
    cdef uint8_t who
    if not gone.any:
        return
    for i in range(count):
        pair = &pairs[i]
        if pair.primary == 0:
            continue
        of_group = gone.sds_ids[pair.group]
        j = 0
        while j < <uint32_t>GONE_MAX and of_group[j]:
            if pair.primary == of_group[j] or pair.secondary == of_group[j]:
                who = LEFT_PRIMARY if pair.primary == of_group[j] else LEFT_SECONDARY
                pair.left |= who
                pair.next_left |= who
            j += 1


cdef int flushset_begin(FlushSet* f, DirtyPair** out, uint64_t* mark) noexcept nogil:
    cdef DirtyPair* pair
    cdef uint32_t i
    cdef int count = 0
    out[0] = NULL
    mark[0] = 0
    if f.count == 0:
        return 0
    out[0] = <DirtyPair*>malloc(f.count * sizeof(DirtyPair))
    if out[0] == NULL:
        return -ENOMEM
    f.last_mark = f.last_mark % (MARK_CLEARED - 1) + 1
    mark[0] = f.last_mark
    for i in range(f.capacity):
        pair = &f.pairs[i]
        if pair.primary:
            if pair.next_since:                            # of writes after an earlier flush, which is not answered
                pair.since = min(pair.since, pair.next_since)
                pair.left |= pair.next_left
                pair.next_since = pair.next_left = 0
            out[0][count] = pair[0]
            pair.mark = f.last_mark
            count += 1
    return count


cdef void flushset_end(FlushSet* f, const DirtyPair* pairs, uint32_t count, uint64_t mark) noexcept nogil:
    cdef DirtyPair* pair
    cdef uint32_t i, cleared = 0
    for i in range(count):
        if f.capacity == 0:
            return
        pair = _find(f, pairs[i].primary, pairs[i].secondary, pairs[i].group)
        if pair.primary == 0 or pair.mark != mark:
            continue                 # a later flush has taken its copy: it clears, since its copy holds this one's
        pair.mark = 0
        if pair.next_since:
            pair.primary_incarnation = pair.next_primary
            pair.secondary_incarnation = pair.next_secondary
            pair.since = pair.next_since
            pair.left = pair.next_left
            pair.next_since = 0
        else:
            pair.mark = MARK_CLEARED         # taken out below, all at once: probing must not be cut in between
            cleared += 1
    if cleared:
        _drop_cleared(f)


cdef void _drop_cleared(FlushSet* f) noexcept nogil:
    cdef uint32_t i, left = 0
    for i in range(f.capacity):
        if f.pairs[i].primary and f.pairs[i].mark != MARK_CLEARED:
            left += 1
    if left == 0 and f.capacity > CAPACITY_FIRST:          # a flush looks at all of them
        free(f.pairs)
        f.pairs = NULL
        f.capacity = 0
    elif left == 0:
        memset(f.pairs, 0, f.capacity * sizeof(DirtyPair))
    if left == 0:
        f.count = 0
        return
    for i in range(f.capacity):
        if f.pairs[i].mark == MARK_CLEARED:
            f.pairs[i].primary = 0
    f.count = left
    _rehash(f)


cdef void _rehash(FlushSet* f) noexcept nogil:
    """Puts every entry where a probe from its home finds it, in place: repeated until nothing moves."""
    cdef uint32_t i
    cdef DirtyPair pair
    cdef DirtyPair* target
    cdef bint moved = True
    while moved:
        moved = False
        for i in range(f.capacity):
            if f.pairs[i].primary == 0:
                continue
            pair = f.pairs[i]
            f.pairs[i].primary = 0
            target = _find(f, pair.primary, pair.secondary, pair.group)
            if target != &f.pairs[i]:
                moved = True
            target[0] = pair
