"""Leases between SDSs (see targetlease.pxd; the rules: docs/internals/protocol.md and failover.md).

Two SDSs that share chunks let each other serve for LEASE_NS at a time. Each asks over the connection it made, and gets
the lease only if it knows a map that is new enough; so who was left out of a set finds its lease lapsed before anybody
goes on without it. Promises: what this SDS granted ends, on its own clock, no earlier than the holder believes; a lease
is given up before the connection it came by is closed; nothing is granted by who has not heard of the map yet.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memset
from posix.time cimport clock_gettime, timespec
from datapath.connection cimport conn_append
from datapath.targetengine cimport EV_PEER_SILENT, emit, mark_dirty, reply_to
from datapath.targetstate cimport *
from datapath.volumemap cimport MapEntry
from datapath.wire cimport *

cdef extern from "<time.h>" nogil:
    int CLOCK_BOOTTIME

cdef enum:
    HELD_NS = 1450000000             # as used, from the moment of asking: two clocks that run apart by 3 % are safe
    PING_NS = 300000000
    SILENT_NS = 1000000000           # without a lease for so long: it is in trouble
    SILENT_AGAIN_NS = 500000000
    BEHIND_NS = 2000000000           # with an old map for so long: the MDM does not reach it, what it leads is stuck
    AWAY_NS = 400000000


cdef uint64_t now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_BOOTTIME, &t)
    return <uint64_t>t.tv_sec * 1000000000 + t.tv_nsec


cdef Peer* peer_get(Engine* e, uint32_t sds_id) noexcept nogil:
    cdef Peer* p = e.peers[sds_id & (SDS_IDS - 1)]
    if p != NULL:
        return p
    p = <Peer*>calloc(1, sizeof(Peer))
    if p == NULL:
        return NULL
    p.sds_id = sds_id
    # Before our own start we may have granted anything.
    p.granted_ns = p.fence_ns = e.alone_ns
    p.fence_version = e.map_version
    p.next = e.peer_list
    e.peer_list = p
    e.peers[sds_id & (SDS_IDS - 1)] = p
    return p


cdef void peer_connected(Engine* e, Conn* c, uint64_t incarnation) noexcept nogil:
    cdef Peer* p = peer_get(e, (<Session*>c.user).node_id)
    if p == NULL:
        return
    p.incarnation = incarnation
    if c.kind == CONN_PEER_OUT:
        p.out = c
        p.heard_ns = e.now_ns                              # it has a second from now on to grant us something
        ask_lease(e, p)
    else:
        p.incoming = c
        p.behind_ns = 0


cdef void peer_disconnected(Engine* e, Conn* c) noexcept nogil:
    cdef Peer* p = e.peers[(<Session*>c.user).node_id & (SDS_IDS - 1)]
    if p == NULL:
        return
    if p.lease_ns > e.now_ns:
        e.counters.leases_lapsed += 1
    p.lease_ns = 0
    if p.out == c:
        p.out = NULL
    if p.incoming == c:
        p.incoming = NULL


cdef bint leased(Engine* e, const Peer* p) noexcept nogil:
    e.now_ns = now()
    return e.now_ns < p.lease_ns


cdef bint gate_open(Engine* e, const MapEntry* entry) noexcept nogil:
    cdef Peer* p
    if entry.left == 0:
        return True
    p = peer_get(e, entry.left)
    if p == NULL or e.now_ns < p.fence_ns:
        return False
    (<MapEntry*>entry).left = 0                            # our own copy of it
    return True


cdef void fence(Engine* e, uint32_t sds_id, uint64_t version) noexcept nogil:
    cdef Peer* p = peer_get(e, sds_id)
    if p == NULL or (version and p.version >= version):
        return
    p.fence_ns = max(p.fence_ns, p.granted_ns)
    p.fence_version = max(p.fence_version, version)


cdef void ask_lease(Engine* e, Peer* p) noexcept nogil:
    cdef Header h
    memset(&h, 0, sizeof(h))
    h.opcode = OP_PING
    h.seq = e.map_version
    h.op_id = now()
    h.incarnation = e.incarnation
    header_seal(&h)
    conn_append(p.out, &e.pool, &h, HEADER_SIZE)
    mark_dirty(e, p.out)


cdef void lease_asked(Engine* e, Conn* c, const Header* h) noexcept nogil:
    cdef Peer* p = e.peers[(<Session*>c.user).node_id & (SDS_IDS - 1)]
    if p == NULL:
        return
    p.version = max(p.version, h.seq)
    if p.version < p.fence_version or p.version < e.map_version or e.map_version == 0 or p.leaving:
        if p.behind_ns == 0:
            p.behind_ns = e.now_ns
        reply_to(e, c.id, h, ST_NOT_READY, 0)
        return
    p.behind_ns = 0
    p.fence_ns = 0                                         # it acts on the newest map: older beliefs are gone
    p.granted_ns = now() + LEASE_NS
    reply_to(e, c.id, h, ST_OK, 0)


cdef void lease_answered(Engine* e, Conn* c, const Header* h) noexcept nogil:
    cdef Peer* p = e.peers[(<Session*>c.user).node_id & (SDS_IDS - 1)]
    if p == NULL or p.out != c or p.leaving or h.status != ST_OK:
        return
    if h.op_id <= e.now_ns and h.op_id + HELD_NS > p.lease_ns:
        p.lease_ns = h.op_id + HELD_NS
        p.heard_ns = e.now_ns


cdef void peer_heard(Engine* e, const Conn* c) noexcept nogil:
    """It works on what it was sent. A ping has its turn behind all that: under heavy load that may be over a second."""
    cdef Peer* p = e.peers[(<Session*>c.user).node_id & (SDS_IDS - 1)]
    if p != NULL and p.out == c:
        p.heard_ns = e.now_ns


cdef void lease_tick(Engine* e) noexcept nogil:
    cdef Peer* p
    cdef bint silent, behind
    cdef uint64_t turn_ns = e.now_ns - e.turned_ns
    e.turned_ns = e.now_ns
    e.counters.turn_max_ns = max(e.counters.turn_max_ns, turn_ns)
    if e.now_ns < e.next_ping_ns:
        return
    e.next_ping_ns = e.now_ns + PING_NS
    p = e.peer_list
    while p != NULL:
        if turn_ns > AWAY_NS and p.heard_ns:
            p.heard_ns = e.now_ns                          # who was away itself blames nobody
            p.behind_ns = 0
        if p.out != NULL:
            ask_lease(e, p)
        silent = p.heard_ns and e.now_ns > p.heard_ns + SILENT_NS
        behind = p.behind_ns and e.now_ns > p.behind_ns + BEHIND_NS
        if (silent or behind) and not p.leaving and e.now_ns > p.silent_told_ns + SILENT_AGAIN_NS:
            p.silent_told_ns = e.now_ns
            emit(e, EV_PEER_SILENT, p.sds_id, 0, 0, 0, NULL, 0)
        p = p.next


cdef void map_version_set(Engine* e, uint64_t version) noexcept nogil:
    cdef Peer* p = e.peer_list
    if version <= e.map_version:
        return
    while p != NULL:
        if e.map_version == 0:
            p.fence_version = max(p.fence_version, version)
        p = p.next
    e.map_version = version
    e.next_ping_ns = 0                                     # who waits for us to know hears it at once


cdef void peer_dead(Engine* e, uint32_t sds_id, uint64_t incarnation) noexcept nogil:
    cdef Peer* p = e.peers[sds_id & (SDS_IDS - 1)]
    if p != NULL and p.incarnation == incarnation and p.out == NULL and p.incoming == NULL:
        p.granted_ns = p.fence_ns = 0
