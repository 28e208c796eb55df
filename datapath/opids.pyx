"""Which operations of which SDC have been carried out (see opids.pxd).

Promises: what was noted is found until its SDC has used the place again, or memory is short: then the SDC that has been
silent for longest is forgotten, which is counted.
"""

from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

cdef enum:
    PLACES_MIN = 64


cdef inline Issuer* issuer_find(const OpIds* o, uint32_t node_id) noexcept nogil:
    cdef Issuer* issuer = o.issuers[node_id & (ISSUERS - 1)]
    while issuer != NULL and issuer.node_id != node_id:
        issuer = issuer.next
    return issuer


cdef inline bint later(uint64_t op_id, uint64_t than) noexcept nogil:
    return <int64_t>(op_id - than) > 0


cdef void forget(OpIds* o, Issuer* issuer) noexcept nogil:
    cdef Issuer** at = &o.issuers[issuer.node_id & (ISSUERS - 1)]
    cdef uint32_t i
    while at[0] != issuer:
        at = &at[0].next
    at[0] = issuer.next
    for i in range(issuer.count):
        o.forgotten += issuer.entries[i].op_id != 0
    o.size -= issuer.count * sizeof(Entry)
    free(issuer.entries)
    free(issuer)


cdef Issuer* most_silent(OpIds* o, const Issuer* but) noexcept nogil:
    cdef Issuer* found = NULL
    cdef Issuer* issuer
    cdef uint32_t i
    for i in range(ISSUERS):
        issuer = o.issuers[i]
        while issuer != NULL:
            if issuer != but and (found == NULL or issuer.serial < found.serial):
                found = issuer
            issuer = issuer.next
    return found


cdef bint grow(OpIds* o, Issuer* issuer, uint64_t place) noexcept nogil:
    cdef uint32_t count = max(<uint32_t>PLACES_MIN, issuer.count)
    cdef Entry* entries
    cdef Issuer* other
    while count < place:
        count *= 2
    while o.size + (count - issuer.count) * sizeof(Entry) > o.size_max:
        other = most_silent(o, issuer)
        if other == NULL:
            return False
        forget(o, other)
    entries = <Entry*>realloc(issuer.entries, count * sizeof(Entry))
    if entries == NULL:
        return False
    memset(entries + issuer.count, 0, (count - issuer.count) * sizeof(Entry))
    o.size += (count - issuer.count) * sizeof(Entry)
    issuer.entries = entries
    issuer.count = count
    return True


cdef void opids_note(OpIds* o, uint32_t node_id, uint64_t place, uint64_t op_id, uint64_t volume_id,
                     uint32_t index) noexcept nogil:
    cdef Issuer* issuer
    cdef Entry* entry
    if place == 0 or place > PLACES_MAX or op_id == 0:
        return
    issuer = issuer_find(o, node_id)
    if issuer == NULL:
        issuer = <Issuer*>calloc(1, sizeof(Issuer))
        if issuer == NULL:
            o.forgotten += 1
            return
        issuer.node_id = node_id
        issuer.next = o.issuers[node_id & (ISSUERS - 1)]
        o.issuers[node_id & (ISSUERS - 1)] = issuer
    o.serial += 1
    issuer.serial = o.serial
    if place > issuer.count and not grow(o, issuer, place):
        o.forgotten += 1
        return
    entry = &issuer.entries[place - 1]
    if entry.op_id and later(entry.op_id, op_id):
        return
    entry.op_id = op_id
    entry.volume_id = volume_id
    entry.index = index
    entry.serial = o.serial


cdef void opids_undo(OpIds* o, uint32_t node_id, uint64_t place, uint64_t op_id) noexcept nogil:
    cdef Issuer* issuer = issuer_find(o, node_id)
    if issuer != NULL and place and place <= issuer.count and issuer.entries[place - 1].op_id == op_id:
        issuer.entries[place - 1].serial = 0


cdef int opids_find(const OpIds* o, uint32_t node_id, uint64_t place, uint64_t op_id, uint64_t since) noexcept nogil:
    cdef const Issuer* issuer = issuer_find(o, node_id)
    cdef const Entry* entry
    if issuer == NULL or place == 0 or place > issuer.count:
        return OP_NEW
    entry = &issuer.entries[place - 1]
    if entry.op_id == op_id:
        return OP_CARRIED_OUT if entry.serial > since and op_id else OP_NEW
    return OP_FINISHED if entry.op_id and later(entry.op_id, op_id) else OP_NEW


cdef void opids_free(OpIds* o) noexcept nogil:
    cdef uint32_t i
    for i in range(ISSUERS):
        while o.issuers[i] != NULL:
            forget(o, o.issuers[i])


cdef class OperationTable:
    """The table for Python, as the tests drive it."""

    cdef OpIds ids

    def __init__(self, size_max: int) -> None:
        self.ids.size_max = size_max

    def note(self, uint32_t node_id, uint64_t place, uint64_t op_id) -> None:
        opids_note(&self.ids, node_id, place, op_id, 1, 0)

    def undo(self, uint32_t node_id, uint64_t place, uint64_t op_id) -> None:
        opids_undo(&self.ids, node_id, place, op_id)

    def find(self, uint32_t node_id, uint64_t place, uint64_t op_id, uint64_t since=0) -> int:
        return opids_find(&self.ids, node_id, place, op_id, since)

    @property
    def serial(self) -> int:
        return self.ids.serial

    @property
    def size(self) -> int:
        return self.ids.size

    @property
    def forgotten(self) -> int:
        return self.ids.forgotten

    def __dealloc__(self):
        opids_free(&self.ids)
