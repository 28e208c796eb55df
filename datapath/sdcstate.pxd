# Everything an SDC engine knows, as plain structures: volumes, SDSs, requests and their parts, and the lists they
# wait in. All of it belongs to the engine's thread, except where a field says that Python reads it (counters: a torn
# or late value would only be a late figure; the volumes and sds tables never move and their entries are never freed
# while the engine lives).
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stddef cimport size_t
from datapath.connection cimport Buf, Conn, Pool
from datapath.flushset cimport DirtyPair, FlushSet
from datapath.fusechannel cimport Channel
from datapath.histogram cimport Histogram
from datapath.ratelimit cimport RateLimit
from datapath.ring cimport Message, Ring
from datapath.volumemap cimport MapVolume, VolumeMap
from datapath.wire cimport Header

cdef enum:
    SDS_MAX = 1024                   # SDSs that one SDC talks to
    VOLUMES_MAX = 65536
    PART_SLAB = 256                  # parts allocated at a time, and never given back
    PART_SLABS_MAX = 256
    REQUEST_SLAB = 256
    REQUESTS_MAX = 1024              # taken from /dev/fuse and not answered: beyond it no more are read
    REQUEST_BYTES_MAX = 33554432     # the same in bytes of data
    SDS_IN_FLIGHT_MAX = 4096         # parts sent to one SDS and not answered
    SDS_OUT_BYTES_MAX = 16777216     # queued towards one SDS and not taken by the kernel
    CAPABILITY_MAX = 4096

# -- intrusive lists: a link is in one list at a time; a list's head is a link that points to itself when empty
cdef struct Link:
    Link* prev
    Link* next

cdef inline void list_init(Link* head) noexcept nogil:
    head.prev = head
    head.next = head

cdef inline bint list_empty(const Link* head) noexcept nogil:
    return head.next == head

cdef inline void list_append(Link* head, Link* link) noexcept nogil:
    link.prev = head.prev
    link.next = head
    head.prev.next = link
    head.prev = link

cdef inline void list_remove(Link* link) noexcept nogil:
    link.prev.next = link.next
    link.next.prev = link.prev
    list_init(link)

cdef inline void list_take_all(Link* source, Link* target) noexcept nogil:
    """Moves all of `source` to the end of `target`."""
    if source.next == source:
        return
    source.next.prev = target.prev
    target.prev.next = source.next
    source.prev.next = target
    target.prev = source.prev
    list_init(source)

# -- what an SDS has said about a volume's capability on the present connection
cdef enum CapState:
    CAP_NONE = 0
    CAP_ASKED = 1                    # presented, not answered: parts wait
    CAP_GRANTED = 2
    CAP_REFUSED = 3                  # parts wait for set_capability

cdef struct Sds:
    uint16_t id
    uint16_t index                   # in Engine.sds and Volume.caps
    bint connected
    bint told                        # trio knows that a connection is wanted
    bint queued                      # in Engine.to_flush
    bint congested                   # parts in `waiting` wait for room
    Conn conn
    uint64_t durable_incarnation     # 0: never connected
    uint64_t closed_ns
    Link in_flight                   # parts, in the order sent
    Link waiting                     # parts: for a connection, a capability, or room
    uint32_t in_flight_count
    uint64_t latency_ns              # of reads, moving average, scaled to small ones
    uint64_t bytes_in                # of connections closed before; Python reads these
    uint64_t bytes_out

cdef struct Volume:
    Link throttle_link               # in Engine.throttled; first, so that the link is the volume
    uint64_t id
    uint64_t size
    bint read_only
    bint removed
    MapVolume* map
    uint8_t* asked                   # one bit a segment: a map_miss or stale_map event waits for its set_segment
    uint32_t asked_bytes
    char* capability
    uint32_t capability_size
    uint32_t capability_version
    uint8_t caps[1024]               # CapState per Sds.index
    RateLimit iops_limit
    RateLimit bytes_limit
    Link throttled                   # requests
    bint is_throttled                # in Engine.throttled
    Link map_wait                    # parts
    FlushSet dirty
    uint64_t tidy_ns                 # when the engine flushes it by itself; 0: it does not
    uint64_t tidy_by_ns
    bint tidying
    uint64_t forced_at               # Engine.happened when an older copy was last made to serve
    uint32_t writes_since_flush
    uint32_t flush_streak            # flushes in a row that had one write before them
    # Python reads these
    uint64_t read_ops
    uint64_t read_bytes
    uint64_t write_ops
    uint64_t write_bytes
    uint64_t flush_ops
    uint64_t flush_ns
    uint64_t discard_ops
    uint64_t discard_bytes
    uint64_t seek_ops
    uint64_t errors
    uint64_t checksum_errors
    Histogram read_latency
    Histogram write_latency

cdef enum RequestKind:
    REQ_READ = 1                     # the values of FuseKind
    REQ_WRITE = 2
    REQ_DISCARD = 3
    REQ_FLUSH = 4
    REQ_SEEK_DATA = 5
    REQ_SEEK_HOLE = 6

cdef enum RequestSource:
    FROM_FUSE = 1
    FROM_PYTHON = 2
    FROM_BENCH = 3
    FROM_ENGINE = 4                  # a flush that nobody asked for, and nobody hears of

cdef struct FlushMember:
    Sds* sds
    bint due                         # to be asked
    bint spared                      # not waited for, since others vouched
    bint good                        # all it had acknowledged is on its disks, since
    uint64_t incarnation             # this durable incarnation began

cdef struct Request:
    Link link                        # Engine.active or Volume.throttled
    Request* next_free
    uint64_t unique                  # of FUSE, or the token of submit
    uint8_t source
    uint8_t kind
    uint8_t reason                   # why `error`, for the event
    bint keep_size
    bint from_cache
    bint all_data                    # SEEK: no hole may be told of
    bint commit                      # WRITE: acknowledged only when on both disks, so that no flush has to follow
    int error                        # errno
    Volume* volume
    uint64_t offset
    uint64_t length
    uint64_t next                    # bytes from `offset` on that are already in parts
    uint64_t found                   # SEEK
    uint64_t started_ns
    uint64_t deadline_ns
    uint64_t cost                    # bytes held for it, in Engine.request_bytes
    uint32_t live                    # parts
    Part* parts
    Buf* buffer                      # WRITE: owns `data`; READ: assembled here when there is more than one part
    char* data
    bint pumping                     # parts are being made: one that ends at once must not end the request
    DirtyPair* pairs                 # FLUSH: what was dirty when it began
    uint32_t pair_count
    FlushMember* members             # FLUSH: the SDSs in these pairs; Part.position is the index
    uint32_t member_count
    uint64_t flush_mark

cdef enum PartState:
    PART_SENT = 1                    # in Sds.in_flight
    PART_WAITS_SDS = 2               # in Sds.waiting
    PART_WAITS_MAP = 3               # in Volume.map_wait
    PART_BACKS_OFF = 4               # in Engine.backoff

cdef struct Part:
    Link link
    Part* next_free
    Part* sibling                    # of the same request
    uint32_t slot
    uint32_t generation              # with the slot: the request id on the wire
    uint32_t op_place                # of the operation among those not finished, from 1: the same when sent again
    uint8_t state
    uint8_t opcode
    uint8_t tries
    uint8_t payload_tries
    uint8_t bad                      # READ: members that have no good copy, by bit (0 primary, 1 secondary)
    uint8_t later                    # READ: members that asked to come again
    uint8_t bad_tries                # READ: times that all members were bad
    bint again                       # READ: says that what came before did not verify
    bint abandoned                   # nobody waits: its answer is dropped
    bint stale                       # refused with stale_epoch: a map with a newer one is needed
    uint32_t stale_epoch
    Request* request                 # NULL: a capability frame
    Volume* volume
    Sds* sds
    uint32_t chunk
    uint32_t offset                  # on the wire
    uint32_t length
    uint32_t skip                    # READ: bytes in front of what was asked for
    uint32_t take                    # READ: bytes asked for; WRITE: bytes sent
    uint64_t position                # in the request
    uint32_t epoch                   # as sent
    uint16_t primary
    uint16_t secondary
    uint64_t secondary_incarnation   # durable, as known when it was sent
    uint64_t since                   # Engine.happened when it was first sent under this epoch
    uint64_t op_id
    uint64_t sent_ns
    uint64_t retry_ns
    uint32_t sends
    uint8_t hedges                   # READ: times it was sent elsewhere because no answer came
    uint32_t capability_version

cdef struct Bench:
    bint running
    Volume* volume
    uint8_t kind
    bint sequential
    uint32_t block_size
    uint64_t blocks                  # of the span
    uint64_t cursor
    uint64_t random
    uint64_t start_ns
    uint64_t end_ns
    uint32_t live
    uint64_t ops
    uint64_t errors
    Buf* payload
    Histogram latency

# How the link layer (sdclink) tells the request layer (sdcrequest) about a part. The part is in no list; it is the
# callee's. error 0: done, `h` and `body` are the answer; else an errno and a Reason.
ctypedef void (*part_done_fn)(Engine* e, Part* p, int error, int reason, const Header* h, char* body) noexcept nogil
# Whether a flush can be answered without this part's SDS.
cdef enum Spares:
    SPARES_NOT = 0
    SPARES_LATER = 1                 # when it keeps us waiting
    SPARES_NOW = 2                   # it is not a member any more
ctypedef int (*flush_spares_fn)(Engine* e, Part* p) noexcept nogil

cdef struct Engine:
    uint32_t sdc_id
    uint64_t incarnation
    uint64_t deadline_ns
    part_done_fn part_done
    flush_spares_fn flush_spares
    uint64_t now_ns                  # CLOCK_MONOTONIC less skipped_ns, read once a turn
    uint64_t skipped_ns              # time in which the process was not run: no deadline may pass in it
    uint64_t hedge_ns                # when reads are next looked at that take too long
    bint stopping
    bint has_channel
    int epoll_fd
    int timer_fd
    uint64_t timer_ns                # when it fires; 0: it is not set
    Ring commands
    Ring events
    Pool pool
    Channel channel
    bint fuse_armed
    bint fuse_more                   # messages were left at the last turn
    bint relay_more
    bint relay_armed_out
    VolumeMap map                    # by volume id, `user` is the Volume
    VolumeMap inodes                 # by inode, `user` is the Volume
    Volume** volumes
    uint32_t volume_count            # Python reads
    Sds** sds                        # by index
    uint32_t sds_count               # Python reads
    Sds** sds_by_id                  # 65536
    Sds* to_flush[1024]
    uint32_t to_flush_count
    Part** part_slabs
    uint32_t part_slab_count
    Part* free_parts
    Request** request_slabs
    uint32_t request_slab_count
    uint32_t request_slab_capacity
    Request* free_requests
    Link active                      # admitted requests, by deadline
    Link backoff                     # parts, by no order
    uint64_t backoff_ns              # the earliest, 0: none
    Link throttled                   # volumes
    uint64_t throttle_ns             # when the first of them may go on, 0: none waits
    uint32_t request_count           # not answered; Python reads
    uint64_t request_bytes
    uint32_t parked                  # parts that wait for something other than an answer; Python reads
    uint64_t op_id
    uint64_t happened                # counts what flushes must know: SDSs that left a set or lost their memory
    uint64_t lost_at                 # `happened` when an SDS last turned out to have lost its memory
    uint64_t tidy_ns                 # when the first volume is to be flushed, 0: none
    uint64_t reads
    uint64_t resent
    char* zeros                      # what a read of nothing is answered with: 1 MiB and a block
    Bench bench

cdef enum EventKind:
    EV_SDS_CLOSED = 1
    EV_SDS_NEEDED = 2
    EV_MAP_MISS = 3
    EV_STALE_MAP = 4
    EV_CAPABILITY_REFUSED = 5
    EV_UNMOUNTED = 6
    EV_COMPLETED = 7
    EV_IO_ERROR = 8
    EV_CHECKSUM_ERROR = 9
    EV_RELAY_CLOSED = 10
    EV_PAST_END = 11
    EV_FORCED = 12                   # a volume's chunk is served from an older copy now

# Why an application got an error (Request.reason).
cdef enum Reason:
    WHY_NONE = 0
    WHY_DEADLINE = 1
    WHY_COPIES = 2                   # no copy could be read
    WHY_CHECKSUM = 3                 # no copy verifies
    WHY_DISK = 4                     # an SDS's disk refused the write
    WHY_SPACE = 5
    WHY_FLUSH_LOST = 6               # both servers of a pair lost what was not yet on disk
    WHY_PAYLOAD = 7                  # the data arrives damaged each time
    WHY_OLD_SESSION = 8              # a newer session of this SDC has taken over
    WHY_BAD_REQUEST = 9
    WHY_STOPPED = 10

cdef int engine_alloc(Engine* e) noexcept nogil
cdef void engine_free(Engine* e) noexcept nogil
cdef uint64_t clock_ns() noexcept nogil
cdef void emit(Engine* e, uint32_t kind, uint32_t a, uint64_t b, uint64_t c, uint64_t d,
               char* data, uint64_t size) noexcept nogil
cdef Request* request_new(Engine* e) noexcept nogil
cdef void request_free(Engine* e, Request* r) noexcept nogil
cdef Part* part_new(Engine* e) noexcept nogil
# The part must be in no list.
cdef void part_free(Engine* e, Part* p) noexcept nogil
# By the request id of an answer; NULL when no such part is in flight.
cdef Part* part_find(Engine* e, uint64_t request_id) noexcept nogil
# The SDS with this number, made when it is not known; NULL when there are SDS_MAX.
cdef Sds* sds_get(Engine* e, uint32_t id) noexcept nogil
cdef Volume* volume_get(Engine* e, uint64_t id, uint64_t inode) noexcept nogil
cdef Volume* volume_find(Engine* e, uint64_t id) noexcept nogil
# Makes room in `asked` for all segments of the volume.
cdef int volume_fit_asked(Volume* v) noexcept nogil

cdef inline uint64_t part_request_id(const Part* p) noexcept nogil:
    return <uint64_t>p.generation << 32 | p.slot
