"""Operations that an SDC sends again (see targetops.pxd; the rules: docs/internals/protocol.md, "Operation ids").

An operation is noted when it is applied, here and by REPLICATE at every other copy. What a copy is to know of the time
before it was one, it is told by the primary once it has the data: at the end of a comparison, and when a learner has
become whole. Promises: an operation is known here only if the copy here has it, or what came after it; and it is
answered only when every member has it, because its first copy is waited for, and a chunk whose copies may differ
serves nothing.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from datapath.chunkstore cimport chunk_find, chunk_get
from datapath.opids cimport (ISSUERS, OP_CARRIED_OUT, OP_FINISHED, Entry, Issuer, opids_find, opids_note, opids_undo)
from datapath.targetdurability cimport sync_wait
from datapath.targetengine cimport forward, op_settle, replicate, send_head, volume_commit
from datapath.targetmembers cimport entry_of
from datapath.targetstate cimport *
from datapath.volumemap cimport MapEntry
from datapath.wire cimport FLAG_COMMIT, OP_PING, OP_REPLY, ST_OK, ST_OLD_SESSION


cdef inline uint64_t place_of(const Op* op) noexcept nogil:
    """A client says it in `seq`, which REPLICATE needs for the write's."""
    return op.h.seq if op.kind < KIND_REPLICATE else op.h.incarnation


cdef bint op_known(Engine* e, Op* op) noexcept nogil:
    cdef int known = opids_find(&e.op_ids, op.h.node_id, place_of(op), op.h.op_id, op.chunk.known_since)
    if known == OP_FINISHED:
        op_settle(e, op, PENDING_LOCAL, ST_OLD_SESSION)
    elif known == OP_CARRIED_OUT:
        e.counters.ops_known += 1
        op.known = True
        if op.h.flags & FLAG_COMMIT or volume_commit(e, op.h.volume_id):
            replicate(e, op)
            forward(e, op)
            op.pending |= PENDING_SYNC
            sync_wait(e, op)
        op_settle(e, op, PENDING_LOCAL, ST_OK)
    return known == OP_FINISHED or known == OP_CARRIED_OUT


cdef void op_note(Engine* e, Op* op) noexcept nogil:
    if op.kind == KIND_PUSH or op.h.op_id == 0:
        return
    opids_note(&e.op_ids, op.h.node_id, place_of(op), op.h.op_id, op.chunk.volume_id, op.chunk.index)
    op.chunk.noted = True


cdef void op_undo(Engine* e, Op* op) noexcept nogil:
    opids_undo(&e.op_ids, op.h.node_id, place_of(op), op.h.op_id)


cdef void ops_forget(Engine* e, Chunk* chunk) noexcept nogil:
    if chunk.noted:
        chunk.known_since = e.op_ids.serial


cdef void tell(Engine* e, Conn* c, const Issuer* issuer, uint32_t at) noexcept nogil:
    cdef const Entry* entry = &issuer.entries[at]
    cdef Header h
    memset(&h, 0, sizeof(h))
    # On a connection that the other side has made there are only answers.
    h.opcode = OP_PING if c.kind == CONN_PEER_OUT else OP_PING | OP_REPLY
    h.volume_id = entry.volume_id
    h.chunk_index = entry.index
    h.node_id = issuer.node_id
    h.op_id = entry.op_id
    h.seq = at + 1
    h.incarnation = e.incarnation
    send_head(e, c, &h)


cdef void ops_tell(Engine* e, Conn* c, const Chunk* chunk) noexcept nogil:
    cdef const Issuer* issuer
    cdef const Entry* entry
    cdef uint32_t i, at
    if not chunk.noted:
        return
    for i in range(ISSUERS):
        issuer = e.op_ids.issuers[i]
        while issuer != NULL:
            for at in range(issuer.count):
                entry = &issuer.entries[at]
                if (entry.op_id and entry.volume_id == chunk.volume_id and entry.index == chunk.index
                        and entry.serial > chunk.known_since):
                    tell(e, c, issuer, at)
            issuer = issuer.next


cdef bint shared(Engine* e, Conn* c, const Entry* entry) noexcept nogil:
    """Whether the entry's chunk is the pair's, led by the one that has made the connection, and both copies have what
    we know of."""
    cdef uint32_t other = (<Session*>c.user).node_id
    cdef bint ours = c.kind == CONN_PEER_OUT
    cdef const Chunk* chunk = chunk_find(e, entry.volume_id, entry.index)
    cdef const MapEntry* map = entry_of(e, entry.volume_id, entry.index)
    if chunk == NULL or map == NULL or entry.serial <= chunk.known_since:
        return False
    if map.primary != (e.sds_id if ours else other) or map.secondary != (other if ours else e.sds_id):
        return False
    return not chunk.unsynced if ours else not chunk.doubtful


cdef void ops_tell_all(Engine* e, Conn* c) noexcept nogil:
    cdef const Issuer* issuer
    cdef uint32_t i, at
    for i in range(ISSUERS):
        issuer = e.op_ids.issuers[i]
        while issuer != NULL:
            for at in range(issuer.count):
                if issuer.entries[at].op_id and shared(e, c, &issuer.entries[at]):
                    tell(e, c, issuer, at)
            issuer = issuer.next


cdef void ops_told(Engine* e, const Header* h) noexcept nogil:
    cdef Chunk* chunk = chunk_get(e, h.volume_id, h.chunk_index)
    if chunk != NULL:
        opids_note(&e.op_ids, h.node_id, h.seq, h.op_id, h.volume_id, h.chunk_index)
        chunk.noted = True


cdef void ops_told_back(Engine* e, Conn* c, const Header* h) noexcept nogil:
    cdef const Peer* p = e.peers[(<Session*>c.user).node_id & (SDS_IDS - 1)]
    cdef Chunk* chunk = chunk_find(e, h.volume_id, h.chunk_index)
    if p == NULL:
        return
    if chunk != NULL and chunk.doubtful:
        chunk.told_by = <uint16_t>p.sds_id
    elif p.agreed_as_primary:
        return
    ops_told(e, h)


cdef void ops_forget_told(Engine* e, uint32_t sds_id) noexcept nogil:
    cdef uint32_t i
    cdef Chunk* chunk
    for i in range(e.table_capacity):
        chunk = e.table[i]
        while chunk != NULL:
            if chunk.doubtful and chunk.told_by == sds_id:
                ops_forget(e, chunk)
            chunk = chunk.hash_next
