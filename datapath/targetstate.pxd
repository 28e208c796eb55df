# The SDS engine's structures. One shard's thread owns all of it; pool threads touch only the Job they run and its
# buffers.
from libc.stdint cimport uint32_t, uint64_t
from datapath.device cimport Device
from datapath.connection cimport Buf, Conn, Pool
from datapath.histogram cimport Histogram
from datapath.iopool cimport IoPool, Job
from datapath.ondisk cimport Tag
from datapath.ring cimport Ring
from datapath.volumemap cimport VolumeMap
from datapath.wire cimport Header

cdef enum:
    CONNS_MAX = 1024
    DEVICES_MAX = 64
    GRANTS_MAX = 64                  # volumes one SDC may use over one connection
    MISSES_MAX = 4096
    CAPABILITY_SIZE = 64
    CAPABILITIES_ASKED_MAX = 64      # that one connection may have waiting for an answer

cdef enum ConnKind:
    CONN_CLIENT = 1
    CONN_PEER_OUT = 2                # we replicate on it
    CONN_PEER_IN = 3                 # a primary replicates to us

cdef enum OpKind:
    KIND_WRITE = 1
    KIND_DISCARD = 2
    KIND_READ = 3
    KIND_FLUSH = 4
    KIND_REPLICATE = 5
    KIND_REPLICATE_DISCARD = 6
    KIND_PUSH = 7

cdef enum OpState:
    STATE_QUEUED = 0                 # behind an overlapping operation
    STATE_JOURNAL = 1                # its chunk's intent is not on disk yet
    STATE_REMOTE_FIRST = 2           # a chunk's first write: the other copy says first that it has room
    STATE_RUNNING = 3                # started: applied, or being read

cdef enum Pending:
    PENDING_LOCAL = 1
    PENDING_REMOTE = 2
    PENDING_SYNC = 4

cdef struct Grant:
    uint64_t volume_id
    uint64_t expires_ns
    bint write

cdef struct Session:                 # Conn.user
    uint32_t node_id
    uint64_t incarnation
    bint ready                       # peers: the pair agreed on what may differ
    uint32_t capabilities_asked
    uint32_t grant_count
    uint32_t grant_next              # when all are taken: the oldest, which makes room
    Grant grants[64]

cdef struct TargetVolume:            # MapVolume.user
    uint64_t size
    bint known
    bint dropped
    bint commit
    bint thick
    bint purge
    bint aged                        # dropped, and nothing of it is here: purged by ourselves, without telling
    uint32_t slots

cdef struct Chunk:
    uint64_t volume_id
    uint32_t index
    uint32_t slot                    # SLOT_NONE: never written, or all discarded
    uint32_t device
    uint32_t live_blocks             # not holes
    uint64_t generation              # of the journal that holds its last intent (DeviceState.generation)
    uint64_t mark                    # journal count that makes the intent durable
    bint unsynced                    # may differ from the other copy: does not serve until they agree
    uint64_t retry_ns                # unsynced: the agreement failed, not tried again before
    Chunk* hash_next
    Op* ops                          # started or waiting, in order of arrival

cdef struct Op:
    Job job
    int kind
    int state
    uint32_t pending
    uint32_t status
    uint32_t conn_id
    uint32_t slot_of_op              # its own position: replication's request id is made of it
    uint32_t serial
    Header h
    Buf* owner
    char* data
    uint32_t* checks
    Tag* push_tags
    Chunk* chunk
    uint32_t first                   # blocks
    uint32_t count
    uint64_t seq
    uint64_t started_ns
    int fd
    uint64_t offset
    Op* next                         # in the chunk
    Op* wait_next                    # in a device's journal or sync list, or the free list

cdef struct DeviceState:
    Device* d
    Job commit_job
    Job sync_job
    Job checkpoint_job
    Job writeback_job
    uint64_t large_bytes             # written in large pieces since the last writeback
    bint commit_running
    bint sync_running
    int checkpoint                   # 0 idle, 1 waits for its intents, 2 runs
    uint64_t checkpoint_mark
    uint64_t checkpoint_generation
    uint64_t checkpoint_started_ns
    uint64_t generation
    uint32_t refused                 # of the resting slots, given back as the other copy had no room: not waited for
    Op* journal_head
    Op* journal_tail
    Op* sync_now                     # wait for the running sync
    Op* sync_next                    # wait for the one after it
    bint reported

cdef struct Sync:                    # the agreement of a pair, one chunk at a time (per outgoing peer)
    Chunk* chunk
    uint32_t outstanding
    uint64_t chunks
    uint64_t pulled
    uint64_t pushed
    bint failed                      # something of this chunk could not be read, sent or written
    bint postponed                   # the chunk's intent is not durable yet

cdef struct Counters:
    uint64_t read_ops, read_bytes, read_ns, write_ops, write_bytes, write_ns, replicate_ops, replicate_bytes
    uint64_t flush_ops, flush_ns, discard_ops, reads_inline, reads_pooled, checksum_errors, journal_commits, checkpoints
    uint64_t bad_frames
    uint32_t clients, peers, queue_depth

cdef struct Engine:
    uint32_t sds_id
    uint64_t incarnation
    uint64_t durable_incarnation
    uint64_t counter
    int epoll_fd
    Ring commands
    Ring events
    Pool pool
    IoPool io
    VolumeMap map
    Chunk** table
    uint32_t table_capacity
    uint32_t chunk_count
    DeviceState devices[64]
    uint32_t device_count
    Conn* conns[1024]
    Sync syncs[1024]
    uint32_t dirty_places[1024]      # in conns: have something to send
    bint dirty_place[1024]
    uint32_t dirty_count
    Op** ops
    uint32_t op_count
    Op* free_ops
    uint64_t miss_volume[4096]
    uint32_t miss_segment[4096]
    uint32_t miss_count
    uint64_t reserved
    uint32_t unsynced_count
    bint purging
    bint stopping
    bint writeback_running
    uint64_t now_ns
    uint64_t next_tick_ns
    char* scratch                    # 4 MiB
    Counters counters
    Histogram read_histogram
    Histogram write_histogram
