# Leases between SDSs, and who may be served alone. Shard's thread only.
from libc.stdint cimport uint32_t, uint64_t
from datapath.connection cimport Conn
from datapath.targetstate cimport Engine, Peer
from datapath.volumemap cimport MapEntry
from datapath.wire cimport Header

cdef enum:
    LEASE_NS = 1500000000            # as granted, from the moment of granting

cdef uint64_t now() noexcept nogil
# The other SDS, made when it is new. NULL when memory is gone.
cdef Peer* peer_get(Engine* e, uint32_t sds_id) noexcept nogil
# A connection to or from another SDS is there, or is about to be closed.
cdef void peer_connected(Engine* e, Conn* c, uint64_t incarnation) noexcept nogil
cdef void peer_disconnected(Engine* e, Conn* c) noexcept nogil
# Whether the other member lets us serve now. Reads the clock: a process that was frozen finds its lease lapsed.
cdef bint leased(Engine* e, const Peer* p) noexcept nogil
# Whether the member that left the set at this epoch serves no more. An entry whose gate has opened stays open.
cdef bint gate_open(Engine* e, const MapEntry* entry) noexcept nogil
# The entry is new and names a member that left: what it was granted holds us up, and it gets no more before it knows.
cdef void fence(Engine* e, uint32_t sds_id, uint64_t version) noexcept nogil
# PING without a volume: the peer that made the connection asks for a lease.
cdef void lease_asked(Engine* e, Conn* c, const Header* h) noexcept nogil
cdef void lease_answered(Engine* e, Conn* c, const Header* h) noexcept nogil
# Something else than a ping was answered on this connection of ours: the peer is not silent, if it grants nothing.
cdef void peer_heard(Engine* e, const Conn* c) noexcept nogil
# Pings that are due, peers that have been silent.
cdef void lease_tick(Engine* e) noexcept nogil
# The MDM's commands.
cdef void map_version_set(Engine* e, uint64_t version) noexcept nogil
cdef void peer_dead(Engine* e, uint32_t sds_id, uint64_t incarnation) noexcept nogil
