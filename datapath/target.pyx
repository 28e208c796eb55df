"""The SDS engine's thread: its loop, the mailbox's commands, and what Python sees (``Target``; see target.pyi)."""

import threading

from libc.errno cimport ECONNREFUSED, ENOBUFS, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset, strlen
from cpython.bytes cimport PyBytes_FromStringAndSize
from posix.unistd cimport close
from datapath.blockfile cimport BlockDevice
from datapath.device cimport Device, device_slot_free, device_tags
from datapath.chunkstore cimport chunk_get, chunk_tags
from datapath.connection cimport buf_put, conn_destroy, conn_flush, conn_init, conn_receive, pool_destroy, pool_init
from datapath.histogram cimport hist_list
from datapath.iopool cimport Job, iopool_start, iopool_stop, iopool_take
from datapath.ondisk cimport SLOT_NONE, SLOT_USED, Tag
from datapath.opids cimport opids_free
from datapath.ring cimport Message, ring_clear, ring_destroy, ring_init, ring_pop, ring_push, ring_retry
from datapath.tags cimport tag_is_hole, tag_newer
from datapath.targetengine cimport *
from datapath.targetstate cimport *
from datapath.targetdurability cimport checkpoint_start, durability_done, last_checkpoint
from datapath.targetframes cimport grant, on_frame, revoke
from datapath.targetinspect cimport corrupt, repair, verify
from datapath.targetlearn cimport (LEARN_WAIT_MS, copy_read, learn_begin, learn_free, learn_lost, learn_rate,
                                   learn_tick)
from datapath.targetlease cimport (LEASE_NS, lease_tick, map_version_set, now, peer_connected, peer_dead,
                                   peer_disconnected, peer_get)
from datapath.targetlost cimport lost_tell
from datapath.targetmembers cimport discard_strays, release_gated, tell_leaving
from datapath.targetpair cimport peer_lost, sync_begin, sync_continue, unsync
from datapath.targetread cimport read_done
from datapath.targetrepair cimport check_read, scrub_rate, scrub_tick
from datapath.targetunsure cimport unsure_tick
from datapath.targetvolumes cimport (forget_dropped, misses_answered, purge, segment, volume_get,
                                     volume_report)
from datapath.volumemap cimport map_destroy, map_init
from datapath.waiting cimport (EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLLIN, EPOLLOUT, epoll_create1,
                               epoll_ctl, epoll_event, epoll_wait, pfvol_short_slice)
from datapath.wire cimport CHUNK_BLOCKS, ST_OK, bad_frame_text

cdef extern from "<string.h>" nogil:
    const char* strerror(int number)

cdef enum:
    WAKE_COMMANDS = 1 << 20
    WAKE_JOBS = 2 << 20
    TABLE_SIZE = 65536
    TICK_NS = 200000000
    OUT_BYTES_MAX = 67108864         # a peer that does not read is cut off

cdef const char* CLOSED_HERE = "closed by this SDS"
cdef const char* NO_ROOM = "no room for another connection"

cdef enum Command:
    CMD_STOP = 1
    CMD_CONN = 2
    CMD_CLOSE = 3
    CMD_GRANT = 4
    CMD_REFUSE = 5
    CMD_REVOKE = 6
    CMD_VOLUME = 7
    CMD_DROP = 8
    CMD_PURGE = 9
    CMD_SEGMENT = 10
    CMD_RESERVED = 11
    CMD_CHECKPOINT = 12
    CMD_VERIFY = 13
    CMD_MAP_VERSION = 14
    CMD_LEAVE = 15
    CMD_STAY = 16
    CMD_DEAD = 17
    CMD_RATE = 18
    CMD_SCRUB = 19
    CMD_CORRUPT = 20
    CMD_REPAIR = 21
    CMD_MAPS_WHOLE = 22


cdef void arm(Engine* e, Conn* c, bint write) noexcept nogil:
    cdef epoll_event ev
    ev.events = EPOLLIN | (EPOLLOUT if write else 0)
    ev.data.u64 = c.id & (CONNS_MAX - 1)
    c.want_write = write
    epoll_ctl(e.epoll_fd, EPOLL_CTL_MOD, c.fd, &ev)


cdef void drop_conn(Engine* e, Conn* c) noexcept nogil:
    cdef Session* s = <Session*>c.user
    cdef const char* why = strerror(c.error) if c.error else CLOSED_HERE
    if c.error < 0:
        why = bad_frame_text(-c.error)
        e.counters.bad_frames += 1
    c.closing = True
    e.conns[c.id & (CONNS_MAX - 1)] = NULL
    if c.kind == CONN_CLIENT:
        e.counters.clients -= 1
        emit(e, EV_CLIENT_CLOSED, c.id, s.node_id, 0, 0, why, strlen(why))
    else:
        e.counters.peers -= 1
        peer_disconnected(e, c)
        if c.kind == CONN_PEER_OUT:
            peer_lost(e, c)
            learn_lost(e, s.node_id)
            memset(&e.syncs[c.id & (CONNS_MAX - 1)], 0, sizeof(Sync))
        emit(e, EV_PEER_CLOSED, c.id, s.node_id, c.kind == CONN_PEER_OUT, 0, why, strlen(why))
    conn_destroy(c, &e.pool)
    free(s)
    free(c)


cdef void add_conn(Engine* e, Message* m) noexcept nogil:
    """a: id, b: fd, c: node, d: incarnation, size: kind."""
    cdef Conn* c
    cdef Conn* old
    cdef Session* s
    cdef epoll_event ev
    cdef uint32_t i
    for i in range(CONNS_MAX):                             # a newer session fences the older one before it is served
        old = e.conns[i]
        if old != NULL and old.kind == <int>m.size and (<Session*>old.user).node_id == m.c:
            drop_conn(e, old)
    c = <Conn*>calloc(1, sizeof(Conn))
    s = <Session*>calloc(1, sizeof(Session))
    if c == NULL or s == NULL or e.conns[m.a & (CONNS_MAX - 1)] != NULL or conn_init(c, &e.pool, <int>m.b, m.a) < 0:
        free(c)
        free(s)
        close(<int>m.b)
        emit(e, EV_CLIENT_CLOSED if m.size == CONN_CLIENT else EV_PEER_CLOSED, m.a, m.c, m.size == CONN_PEER_OUT, 0,
             NO_ROOM, strlen(NO_ROOM))
        return
    c.kind = <int>m.size
    c.user = s
    s.node_id = <uint32_t>m.c
    s.incarnation = m.d
    e.conns[m.a & (CONNS_MAX - 1)] = c
    ev.events = EPOLLIN
    ev.data.u64 = m.a & (CONNS_MAX - 1)
    if c.kind == CONN_CLIENT:
        e.counters.clients += 1
    else:
        e.counters.peers += 1
    if epoll_ctl(e.epoll_fd, EPOLL_CTL_ADD, c.fd, &ev) < 0:
        c.error = errno
        drop_conn(e, c)
    elif c.kind != CONN_CLIENT:
        peer_add(e, c, m.d)


cdef void peer_add(Engine* e, Conn* c, uint64_t incarnation) noexcept nogil:
    cdef Peer* p = peer_get(e, (<Session*>c.user).node_id)
    if p == NULL or p.leaving:                             # until the MDM has spoken there is nothing to say to it
        c.error = ECONNREFUSED
        drop_conn(e, c)
        return
    peer_connected(e, c, incarnation)
    if c.kind == CONN_PEER_OUT:
        sync_begin(e, c)


cdef void leave(Engine* e, uint32_t sds_id) noexcept nogil:
    """Nothing goes on with this peer before the MDM has said who stays. What it was sent is applied here too."""
    cdef Peer* p = peer_get(e, sds_id)
    if p == NULL:
        return
    p.leaving = True
    if p.out != NULL:
        drop_conn(e, p.out)
    if p.incoming != NULL:
        drop_conn(e, p.incoming)
    tell_leaving(e, p)


cdef void stay(Engine* e, uint32_t sds_id) noexcept nogil:
    cdef Peer* p = e.peers[sds_id & (SDS_IDS - 1)]
    if p != NULL:
        p.leaving = False
        p.heard_ns = e.now_ns
        p.behind_ns = 0


cdef void command(Engine* e, Message* m) noexcept nogil:
    cdef TargetVolume* v
    if m.kind == CMD_STOP:
        e.stopping = True
    elif m.kind == CMD_CONN:
        add_conn(e, m)
    elif m.kind == CMD_CLOSE:
        if conn_by_id(e, m.a) != NULL:
            drop_conn(e, conn_by_id(e, m.a))
    elif m.kind == CMD_GRANT:
        grant(e, m, ST_OK)
    elif m.kind == CMD_REFUSE:
        grant(e, m, <uint32_t>m.d)
    elif m.kind == CMD_REVOKE:
        revoke(e, m.b, m.a)
    elif m.kind == CMD_SEGMENT:
        segment(e, m)
    elif m.kind == CMD_RESERVED:
        e.reserved = m.b
    elif m.kind == CMD_CHECKPOINT:
        checkpoint_start(e)
    elif m.kind == CMD_VERIFY:
        verify(e, m.b, m.c, m.a)
    elif m.kind == CMD_REPAIR:
        repair(e, m.c, m.a)
    elif m.kind == CMD_CORRUPT:
        corrupt(e, m.b, m.c, m.a, <uint32_t>m.d)
    elif m.kind == CMD_MAP_VERSION:
        map_version_set(e, m.b)
    elif m.kind == CMD_LEAVE:
        leave(e, m.a)
    elif m.kind == CMD_STAY:
        stay(e, m.a)
    elif m.kind == CMD_DEAD:
        peer_dead(e, m.a, m.b)
    elif m.kind == CMD_RATE:
        learn_rate(e, m.a, m.b)
    elif m.kind == CMD_SCRUB:
        scrub_rate(e, m.b)
    elif m.kind == CMD_MAPS_WHOLE:
        e.maps_whole = True
    else:
        v = volume_get(e, m.b)
        if v == NULL:
            return
        if m.kind == CMD_VOLUME:
            v.size = m.c
            v.commit = m.d & 1
            v.thick = (m.d & 2) != 0
            v.pool_id = m.a
            v.known = True
            v.dropped = False
            v.purge = v.purge and not v.aged
            v.aged = False
        else:
            v.dropped = True
            v.known = True
            misses_answered(e, m.b, -1)
            if m.kind == CMD_PURGE:
                v.purge = True
                v.aged = False
                purge(e)


cdef void flush_conns(Engine* e) noexcept nogil:
    cdef uint32_t place
    cdef Conn* c
    cdef int result
    while e.dirty_count:                                   # a stack: dropping a connection makes others dirty again
        e.dirty_count -= 1
        place = e.dirty_places[e.dirty_count]
        e.dirty_place[place] = False
        c = e.conns[place]
        if c == NULL:
            continue
        result = conn_flush(c, &e.pool)
        if result >= 0 and c.out_bytes > OUT_BYTES_MAX:
            c.error = ENOBUFS
        if result < 0 or c.error:
            drop_conn(e, c)
        elif (result == 1) != c.want_write:
            arm(e, c, result == 1)


cdef void tick(Engine* e) noexcept nogil:
    e.next_tick_ns = e.now_ns + TICK_NS
    ring_retry(&e.events)
    forget_dropped(e)
    if e.purging:
        purge(e)
    if e.strays:
        discard_strays(e)
    sync_continue(e)
    if e.lost:
        lost_tell(e)
    if e.unsure:
        unsure_tick(e)
    learn_begin(e)
    volume_report(e)


cdef void run(Engine* e) noexcept nogil:
    """The shard's thread, for its whole life."""
    cdef epoll_event evs[64]
    cdef int count, i
    cdef uint32_t at
    cdef Message m
    cdef Job* job
    cdef Job* following
    cdef Conn* c
    pfvol_short_slice()
    while not e.stopping:
        count = epoll_wait(e.epoll_fd, evs, 64, e.wait_ms)
        e.now_ns = now()
        for i in range(count):
            if evs[i].data.u64 == WAKE_COMMANDS:
                ring_clear(&e.commands)
                while ring_pop(&e.commands, &m):
                    command(e, &m)
                    free(m.data)
            elif evs[i].data.u64 == WAKE_JOBS:
                job = iopool_take(&e.io)
                while job != NULL:
                    following = job.next
                    if job.kind == KIND_READ:
                        read_done(e, <Op*>job.owner)
                    elif job.kind == KIND_COPY:
                        copy_read(e, <Op*>job.owner)
                    elif job.kind == KIND_CHECK:
                        check_read(e, <Op*>job.owner)
                    else:
                        durability_done(e, job)
                    job = following
            else:
                c = e.conns[evs[i].data.u64]
                if c == NULL:
                    continue
                if evs[i].events & EPOLLOUT:
                    mark_dirty(e, c)
                if evs[i].events & ~EPOLLOUT and conn_receive(c, &e.pool, on_frame, e) < 0:
                    drop_conn(e, c)
        if e.gated:
            release_gated(e)
        lease_tick(e)
        learn_tick(e)
        scrub_tick(e)
        flush_conns(e)
        if e.now_ns >= e.next_tick_ns:
            tick(e)
    for at in range(CONNS_MAX):
        if e.conns[at] != NULL:
            drop_conn(e, e.conns[at])
    iopool_stop(&e.io)


cdef bint tags_later(const Tag* tags, const Tag* than) noexcept nogil:
    """Whether the latest write of the one slot came after all those of the other."""
    cdef const Tag* latest = &than[0]
    cdef uint32_t i
    for i in range(CHUNK_BLOCKS):
        if tag_newer(than[i].epoch, than[i].seq, latest):
            latest = &than[i]
    for i in range(CHUNK_BLOCKS):
        if tag_newer(tags[i].epoch, tags[i].seq, latest):
            return True
    return False


cdef class Target:
    cdef Engine* e
    cdef object thread, devices, volumes_seen
    cdef uint32_t serial, devices_unsure
    cdef bint started, stopped
    cdef readonly int event_fd

    def __cinit__(self, uint32_t sds_id, uint64_t incarnation, uint64_t durable_incarnation, *, uint32_t io_threads=4):
        cdef Engine* e = <Engine*>calloc(1, sizeof(Engine))
        cdef epoll_event ev
        if e == NULL:
            raise MemoryError
        self.e = e
        e.io.event_fd = e.commands.event_fd = e.events.event_fd = -1
        e.sds_id = sds_id
        e.incarnation = incarnation
        e.durable_incarnation = durable_incarnation
        e.wait_ms = LEARN_WAIT_MS
        e.op_ids.size_max = OP_IDS_BYTES_MAX
        e.table_capacity = TABLE_SIZE
        e.table = <Chunk**>calloc(TABLE_SIZE, sizeof(Chunk*))
        e.peers = <Peer**>calloc(SDS_IDS, sizeof(Peer*))
        e.scratch = <char*>malloc(4194304)
        pool_init(&e.pool)
        e.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
        if (e.table == NULL or e.peers == NULL or e.scratch == NULL or e.epoll_fd < 0 or map_init(&e.map) < 0
                or ring_init(&e.commands, 4096) < 0 or ring_init(&e.events, 4096) < 0):
            raise MemoryError("no memory or descriptors for the SDS engine")
        ev.events = EPOLLIN
        ev.data.u64 = WAKE_COMMANDS
        epoll_ctl(e.epoll_fd, EPOLL_CTL_ADD, e.commands.event_fd, &ev)
        self.event_fd = e.events.event_fd
        self.devices = []
        self.volumes_seen = {}
        if iopool_start(&e.io, io_threads) < 0:
            raise OSError("cannot start the IO threads")
        ev.data.u64 = WAKE_JOBS
        epoll_ctl(e.epoll_fd, EPOLL_CTL_ADD, e.io.event_fd, &ev)

    def add_device(self, BlockDevice device):
        cdef Device* d = device.device
        cdef Chunk* c
        cdef uint32_t slot, i, at = self.e.device_count
        if d == NULL or at == DEVICES_MAX or self.thread is not None:
            raise ValueError("add_device takes an open, recovered device before start")
        self.e.devices[at].d = d
        self.e.devices[at].generation = 1
        self.e.device_count += 1
        self.devices.append(device)
        for slot in range(d.slot_count):
            if d.slots[slot].state != SLOT_USED:
                continue
            c = chunk_get(self.e, d.slots[slot].volume_id, d.slots[slot].chunk_index)
            if c == NULL:
                raise MemoryError
            if c.slot != SLOT_NONE and not self._replaces(c, d, slot):
                continue
            c.slot = slot
            c.device = at
            c.live_blocks = 0
            for i in range(CHUNK_BLOCKS):
                c.live_blocks += not tag_is_hole(&chunk_tags(self.e, c)[i])
        if device.unsure:
            self.e.unsure = True
            self.devices_unsure += 1
        for volume_id, index in [chunk[:2] for chunk in device.dirty] + device.freed:
            c = chunk_get(self.e, volume_id, index)
            if c == NULL:
                raise MemoryError
            unsync(self.e, c)
            c.doubtful = c.certain = True

    cdef bint _replaces(self, Chunk* c, Device* d, uint32_t slot) except -1:
        """Of a chunk's slots on two devices the newer one stays, the other is given back: the one of the newer epoch,
        else the one with the latest write.

        A crash leaves two when the chunk gave its slot back, got one on another device, and the first device's journal
        had not told of it yet: what is there is older than all that was written since. So does a device that failed,
        if the chunk left the set and came back on another one, in a newer epoch.
        """
        cdef Device* other = self.e.devices[c.device].d
        cdef uint32_t epoch = d.slots[slot].epoch, than = other.slots[c.slot].epoch
        cdef bint later = epoch > than
        if epoch == than:
            later = tags_later(device_tags(d, slot), device_tags(other, c.slot))
        cdef int error = device_slot_free(other, c.slot) if later else device_slot_free(d, slot)
        if error < 0:
            raise OSError(-error, (<bytes>strerror(-error)).decode())
        return later

    def start(self):
        self.started = True
        self.thread = threading.Thread(target=self._main, name="sds-shard", daemon=True)
        self.thread.start()

    def _main(self):
        self.e.now_ns = now()
        self.e.turned_ns = self.e.now_ns
        self.e.alone_ns = self.e.now_ns + LEASE_NS
        with nogil:
            run(self.e)

    def stop(self, *, bint checkpoint=True):
        if self.stopped or not self.started:
            return
        self.stopped = True
        self._send(CMD_STOP)
        while self.thread.is_alive():
            ring_retry(&self.e.commands)                   # the mailbox may have been full
            self.thread.join(0.05)
        if checkpoint:
            with nogil:
                last_checkpoint(self.e)

    cdef int _send(self, uint32_t kind, uint32_t a=0, uint64_t b=0, uint64_t c=0, uint64_t d=0,
                   uint64_t size=0) except -1:
        cdef Message m
        m.kind = kind
        m.a = a
        m.b = b
        m.c = c
        m.d = d
        m.data = NULL
        m.size = size
        ring_retry(&self.e.commands)
        if ring_push(&self.e.commands, &m) < 0:
            raise MemoryError
        return 0

    def _add(self, int fd, uint32_t node_id, uint64_t incarnation, int kind):
        cdef uint32_t at, _tried
        for _tried in range(CONNS_MAX):
            self.serial += 1
            at = self.serial & (CONNS_MAX - 1)
            if self.e.conns[at] == NULL:
                break
        self._send(CMD_CONN, self.serial, <uint64_t>fd, node_id, incarnation, <uint64_t>kind)
        return self.serial

    def add_client(self, int fd, uint32_t sdc_id, uint64_t incarnation):
        return self._add(fd, sdc_id, incarnation, CONN_CLIENT)

    def add_peer(self, int fd, uint32_t sds_id, uint64_t incarnation, *, bint outgoing):
        return self._add(fd, sds_id, incarnation, CONN_PEER_OUT if outgoing else CONN_PEER_IN)

    def close_conn(self, uint32_t conn_id):
        self._send(CMD_CLOSE, conn_id)

    def grant(self, uint32_t conn_id, uint64_t request_id, uint64_t volume_id, *, bint write, uint64_t expires_boot_ns):
        self._send(CMD_GRANT, conn_id, request_id, volume_id, expires_boot_ns, 2 if write else 1)

    def refuse(self, uint32_t conn_id, uint64_t request_id, uint64_t volume_id, uint32_t status):
        self._send(CMD_REFUSE, conn_id, request_id, volume_id, status)

    def revoke(self, uint64_t volume_id, uint32_t sdc_id):
        self._send(CMD_REVOKE, sdc_id, volume_id)

    def set_volume(self, uint64_t volume_id, uint64_t size_bytes, *, bint commit, bint thick, uint32_t pool_id=0):
        self._send(CMD_VOLUME, pool_id, volume_id, size_bytes, (1 if commit else 0) | (2 if thick else 0))

    def drop_volume(self, uint64_t volume_id):
        self._send(CMD_DROP, 0, volume_id)

    def purge_volume(self, uint64_t volume_id):
        self._send(CMD_PURGE, 0, volume_id)

    def set_segment(self, uint64_t volume_id, uint32_t segment_index, bytes entries not None, uint64_t version=0):
        cdef Message m
        memset(&m, 0, sizeof(m))
        m.kind = CMD_SEGMENT
        m.a = segment_index
        m.b = volume_id
        m.c = version
        m.size = len(entries)
        m.data = <char*>malloc(m.size + 1)
        if m.data == NULL:
            raise MemoryError
        memcpy(m.data, <char*>entries, m.size)
        ring_retry(&self.e.commands)
        if ring_push(&self.e.commands, &m) < 0:
            raise MemoryError

    def set_map_version(self, uint64_t version):
        self._send(CMD_MAP_VERSION, 0, version)

    def leave(self, uint32_t sds_id):
        self._send(CMD_LEAVE, sds_id)

    def stay(self, uint32_t sds_id):
        self._send(CMD_STAY, sds_id)

    def peer_dead(self, uint32_t sds_id, uint64_t incarnation):
        self._send(CMD_DEAD, sds_id, incarnation)

    def set_resync_rate(self, uint32_t pool_id, uint64_t bytes_per_second):
        self._send(CMD_RATE, pool_id, bytes_per_second)

    def set_scrub_rate(self, uint64_t bytes_per_second):
        self._send(CMD_SCRUB, 0, bytes_per_second)

    def set_reserved(self, uint64_t slots):
        self._send(CMD_RESERVED, 0, slots)

    def checkpoint(self):
        self._send(CMD_CHECKPOINT)

    @property
    def unsure(self):
        return bool(self.e.unsure)

    def maps_whole(self):
        self._send(CMD_MAPS_WHOLE)

    def verify(self, uint64_t token, uint64_t volume_id, uint32_t chunk_index):
        self._send(CMD_VERIFY, chunk_index, token, volume_id)

    def repair(self, uint64_t volume_id, uint32_t chunk_index):
        self._send(CMD_REPAIR, chunk_index, 0, volume_id)

    def corrupt(self, uint64_t token, uint64_t volume_id, uint32_t chunk_index, uint32_t block):
        self._send(CMD_CORRUPT, chunk_index, token, volume_id, block)

    def events(self):
        cdef Message m
        out = []
        ring_retry(&self.e.commands)
        ring_clear(&self.e.events)
        while ring_pop(&self.e.events, &m):
            data = PyBytes_FromStringAndSize(m.data, m.size) if m.size else b""
            free(m.data)
            event = self._event(&m, data)
            if event is not None:
                out.append(event)
        return out

    cdef _event(self, Message* m, bytes data):
        text = data.decode("utf-8", "replace") if m.kind in (EV_CLIENT_CLOSED, EV_PEER_CLOSED) else ""
        if m.kind == EV_CAPABILITY:
            return ("capability", m.a, m.b, m.c, data)
        if m.kind == EV_MAP_MISS:
            return ("map_miss", m.b, m.a)
        if m.kind == EV_CLIENT_CLOSED:
            return ("client_closed", m.a, m.b, text)
        if m.kind == EV_PEER_CLOSED:
            return ("peer_closed", m.a, m.b, bool(m.c), text)
        if m.kind == EV_PEER_SYNCED:
            return ("peer_synced", m.a, m.b, m.c, m.d)
        if m.kind == EV_DEVICE_FAILED:
            return ("device_failed", m.a, m.b, (<bytes>strerror(<int>m.b)).decode())
        if m.kind == EV_CHECKPOINT:
            return ("checkpoint", m.b, m.c, m.d / 1e9)
        if m.kind == EV_VERIFIED:
            return ("verified", m.b, bool(m.a), data[:16384], data[16384:])
        if m.kind == EV_CORRUPTED:
            return ("corrupted", m.b, m.a)
        if m.kind == EV_PURGED:
            return ("purged", m.b)
        if m.kind == EV_NO_SPACE:
            return ("no_space", m.b, m.a)
        if m.kind == EV_REPAIR:
            return ("repair_needed", m.b, m.a, m.c, "the block does not match its tag")
        if m.kind == EV_REPAIRED:
            return ("repaired", m.b, m.a, m.c >> 32, m.c & 0xffffffff, m.d)
        if m.kind == EV_SCRUBBED:
            return ("scrubbed", m.b, m.c, m.d)
        if m.kind == EV_GONE:
            return ("chunk_gone", m.b, m.a)
        if m.kind == EV_SURE:
            return ("sure",)
        if m.kind == EV_PEER_SILENT:
            return ("peer_silent", m.a)
        if m.kind == EV_LEAVING:
            numbers = memoryview(data).cast("Q").tolist() if data else []
            return ("leaving", m.a, bool(m.b), bool(m.c), list(zip(numbers[::2], numbers[1::2], strict=True)))
        if m.kind == EV_LEARNED:
            numbers = memoryview(data).cast("Q").tolist()
            return ("learned", m.a, list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)), m.b)
        if m.kind == EV_LEARNER_LOST:
            numbers = memoryview(data).cast("Q").tolist()
            return ("learner_lost", m.a, list(zip(numbers[::2], numbers[1::2], strict=True)))
        if m.kind == EV_LOST:
            numbers = memoryview(data).cast("Q").tolist()
            return ("lost", list(zip(*(numbers[field::4] for field in range(4)), strict=True)))
        if m.kind == EV_COPY_REFUSED:
            numbers = memoryview(data).cast("Q").tolist()
            return ("copy_refused", m.a, list(zip(numbers[::2], numbers[1::2], strict=True)))
        if m.kind == EV_VOLUMES:
            numbers = memoryview(data).cast("Q").tolist() if data else []
            self.volumes_seen = {numbers[i]: tuple(numbers[i + 1:i + 5]) for i in range(0, len(numbers), 5)}
        return None

    def stats(self):
        cdef uint64_t total = 0, unused = 0
        cdef uint32_t i
        for i in range(self.e.device_count):
            total += self.e.devices[i].d.slot_count
            unused += self.e.devices[i].d.free_count + self.e.devices[i].d.quarantine_count
        figures = dict(self.e.counters)
        figures["entries_repaired"] = sum([device.entries_repaired for device in self.devices])
        figures["devices_unsure"] = self.devices_unsure
        figures.update(slots_total=total, slots_free=unused, slots_used=total - unused, slots_reserved=self.e.reserved,
                       buffer_bytes=self.e.pool.bytes_out, known_volumes=self.e.map.count,
                       known_chunks=self.e.chunk_count, op_ids_bytes=self.e.op_ids.size,
                       op_ids_forgotten=self.e.op_ids.forgotten, read_histogram=hist_list(&self.e.read_histogram),
                       write_histogram=hist_list(&self.e.write_histogram), volumes=dict(self.volumes_seen))
        return figures

    def __dealloc__(self):
        # The thread holds a reference to this object: it has ended, or was never started. (self.thread says nothing
        # here: the garbage collector has cleared it.)
        cdef Chunk* c
        cdef Peer* p
        cdef uint32_t i
        if self.e == NULL:
            return
        iopool_stop(&self.e.io)
        for i in range(self.e.op_count):
            if self.e.ops[i].owner != NULL:
                buf_put(&self.e.pool, self.e.ops[i].owner)
            free(self.e.ops[i])
        for i in range(self.e.table_capacity if self.e.table != NULL else 0):
            while self.e.table[i] != NULL:
                c = self.e.table[i]
                self.e.table[i] = c.hash_next
                free(c)
        for i in range(self.e.map.capacity):
            if self.e.map.table[i] != NULL:
                free(self.e.map.table[i].user)
        while self.e.peer_list != NULL:
            p = self.e.peer_list
            self.e.peer_list = p.next
            learn_free(p)
            free(p)
        free(self.e.peers)
        opids_free(&self.e.op_ids)
        ring_destroy(&self.e.commands)
        ring_destroy(&self.e.events)
        map_destroy(&self.e.map)
        pool_destroy(&self.e.pool)
        close(self.e.epoll_fd)
        free(self.e.scratch)
        free(self.e.table)
        free(self.e.ops)
        free(self.e)
