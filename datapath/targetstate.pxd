# The SDS engine's structures. One shard's thread owns all of it; pool threads touch only the Job they run and its
# buffers.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from datapath.device cimport Device
from datapath.connection cimport Buf, Conn, Pool
from datapath.histogram cimport Histogram
from datapath.iopool cimport IoPool, Job
from datapath.opids cimport OpIds
from datapath.ondisk cimport Tag
from datapath.ratelimit cimport RateLimit
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
    SDS_IDS = 65536                  # map entries hold them in 16 bits
    LEARNED_MAX = 1024               # chunks that wait for a learner's disk
    RATES_MAX = 64                   # pools
    OP_IDS_BYTES_MAX = 16777216
    HOPELESS_MAX = 64                # ranges bad in all copies that are remembered

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
    KIND_LOOK = 8                    # TAGS or PULL
    KIND_COPY = 9                    # to a learner
    KIND_CHECK = 10                  # looks at all copies of a range, and repairs

cdef enum OpState:
    STATE_QUEUED = 0                 # behind an overlapping operation
    STATE_JOURNAL = 1                # its chunk's intent is not on disk yet
    STATE_REMOTE_FIRST = 2           # a chunk's first write: the other copy says first that it has room
    STATE_RUNNING = 3                # started: applied, or being read

cdef enum Pending:
    PENDING_LOCAL = 1
    PENDING_REMOTE = 2
    PENDING_SYNC = 4
    PENDING_LEARNER = 8

cdef enum Learn:
    LEARN_NOT = 0
    LEARN_COPYING = 1                # writes go to the learner too; what differs is being sent
    LEARN_WHOLE = 2                  # the learner has everything, maybe not on its disk
    LEARN_TOLD = 3                   # the MDM was asked to let it join: it counts as a member until the map says more
    LEARN_LOST = 4                   # the same, and it may lack something by now

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

cdef struct Learning:                # a chunk that learns: there is one while its state is LEARN_COPYING
    uint64_t serial
    Chunk* chunk
    uint32_t epoch
    uint32_t pool_id
    bint here                        # had a slot here when it began
    bint compared                    # the learner's tags have come, `differs` says what to send
    bint discard                     # it is not here: the learner is to give its slot back
    bint again                       # it was given a slot here, or lost it: compare once more
    uint32_t left                    # blocks still to send
    uint32_t at                      # the first that may be among them
    uint32_t steps                   # operations under way
    uint32_t pushes                  # frames not yet confirmed
    uint8_t differs[128]
    Learning* next

cdef struct Learned:                 # whole, as far as the learner's memory goes
    uint64_t volume_id
    uint32_t index
    uint32_t epoch
    uint64_t serial

cdef struct Learner:                 # what goes on with a peer that learns from us
    Learning* first
    uint32_t count
    uint32_t here                    # of these: with a slot here
    uint32_t steps                   # operations under way, also of chunks that learn no more
    uint32_t pushes                  # frames not yet confirmed
    uint64_t retry_ns                # it had no room, or its disk failed: nothing begins before
    uint64_t since_ns                # the oldest of `whole`
    uint64_t commit_id               # the request that has it sync its disks
    uint32_t whole_count
    uint32_t syncing_count
    Learned whole[1024]
    Learned syncing[1024]

cdef struct LearnRate:
    uint32_t pool_id
    uint64_t bytes_per_second        # 0: nothing is copied
    RateLimit limit

cdef struct Peer:                    # another SDS, from the first connection or map entry that names it
    uint32_t sds_id
    Conn* out                        # made by us: what we ask and say as primary goes there
    Conn* incoming                   # made by it
    bint agreed_as_primary           # since our own start the two have told each other what may differ
    bint agreed_as_secondary
    bint leaving                     # the MDM is being asked to leave it out
    uint64_t incarnation
    uint64_t lease_ns                # what it granted us ends then
    uint64_t granted_ns              # what we granted it ends then
    uint64_t fence_ns                # what we granted it before it had to know a newer map ends then
    uint64_t fence_version           # the map it has to know before it is granted anything again
    uint64_t version                 # the newest map it has said it knows
    uint64_t heard_ns                # when it last granted us a lease, or we connected; 0: never
    uint64_t silent_told_ns
    uint64_t told_incarnation        # in which it has told us of operations
    uint64_t behind_ns               # since when it asks with a map that is too old; 0: it does not
    Learner* learner                 # NULL: it has never learned from us
    Peer* next

cdef struct TargetVolume:            # MapVolume.user
    uint64_t size
    bint known
    bint dropped
    bint commit
    bint thick
    bint purge
    uint32_t pool_id
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
    bint told                        # only because of what others say, who say it again: costs no intent without a slot
    bint waits                       # ours is the secondary, and the primary has not said that whoever left is out
    bint doubtful                    # ours may lack something, since we have restarted and not compared it yet
    bint peer_doubtful               # the other SDS has said the same of its copy
    bint untold                      # all of ours was sent to a secondary that was lost, and is answered to nobody yet
    uint8_t learn                    # LEARN_*
    uint64_t learn_serial            # which time it learns
    uint64_t learn_retry_ns          # it could not: not tried again before
    uint64_t hold_ns                 # not served before: an earlier member that left may still serve
    uint32_t open_epoch              # the primary has said that whoever left before this epoch serves no more
    uint64_t retry_ns                # unsynced: the agreement failed, not tried again before
    bint full                        # no room here for a write that the secondary may have: until they agree
    uint32_t failures                # of its agreement, because of one side's disk
    bint alone                       # the MDM is being asked to leave the secondary out: it stays unsynced until then
    bint certain                     # unsure engine: it is known that it has no slot here
    bint gone                        # unsure engine: nobody can tell what it held
    bint bad                         # a part of it cannot be read or written here: the other member is to go on alone
    uint64_t known_since             # serial in Engine.op_ids: older entries are not of this copy
    uint16_t told_by                 # unsynced: the secondary that has told us some
    bint noted                       # there are or were entries of it: it is not forgotten
    Chunk* hash_next
    Op* ops                          # started or waiting, in order of arrival

cdef struct Op:
    Job job
    int kind
    int state
    uint32_t pending
    uint32_t status
    uint32_t full                    # copies for which the host had no space after the operation had started
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
    uint16_t remote_id               # who has to confirm it: PENDING_REMOTE
    uint16_t learner_id              # PENDING_LEARNER, KIND_COPY
    bint admitted                    # found to be served just now, in this turn: still_status would say the same
    bint known                       # carried out before: it only has to be on the disks
    uint64_t bad                     # KIND_CHECK: own blocks that do not match their tags, by bit
    uint32_t outstanding             # frames not yet answered
    uint32_t repaired
    uint32_t lost                    # blocks that no copy has
    bint scrub                       # the scrubber's
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
    uint32_t place                   # of it in the table
    uint32_t outstanding
    uint64_t chunks
    uint64_t pulled
    uint64_t pushed
    bint failed                      # something of this chunk could not be read, sent or written
    bint refused                     # by the other side's disk
    bint own                         # by our own disk
    bint postponed                   # the chunk's intent is not durable yet

cdef struct Counters:
    uint64_t read_ops, read_bytes, read_ns, write_ops, write_bytes, write_ns, replicate_ops, replicate_bytes
    uint64_t flush_ops, flush_ns, discard_ops, reads_inline, reads_pooled, checksum_errors, journal_commits, checkpoints
    uint64_t bad_frames, leases_lapsed, turn_max_ns
    uint64_t resync_bytes, resync_chunks, resync_left, ops_known
    uint64_t chunks_gone
    uint64_t blocks_repaired, blocks_unrepairable, scrub_chunks, scrub_bytes, scrub_errors, scrub_passes
    uint32_t clients, peers, queue_depth

cdef struct Hopeless:                # no copy has all blocks of this range: not looked at again before
    uint64_t volume_id
    uint32_t index
    uint32_t first
    uint32_t count
    uint64_t until_ns

cdef struct Scrub:
    uint64_t bytes_per_second        # 0: does not scrub
    RateLimit limit
    uint64_t next_ns                 # the next pass does not begin before
    uint32_t place                   # the chunk: place in the table, number there, next block
    uint32_t nth
    uint32_t block
    uint64_t bytes_before            # this pass
    bint running                     # one step at a time

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
    Peer** peers                     # by SDS number
    Peer* peer_list
    uint64_t map_version             # all map segments known here are at least this new; 0: the MDM has not said yet
    uint64_t next_ping_ns
    uint64_t turned_ns               # when the loop last came round
    uint64_t alone_ns                # not alone before: we do not know whom we granted what before our start
    bint gated                       # operations wait for a gate to open
    bint strays                      # the map says of something here that it is not ours
    bint lost                        # chunks here may be lost to a disk: looked for at each tick
    bint unsure                      # a chunk that has no slot may have had one: a device has lost track (targetunsure)
    bint maps_whole                  # all maps with chunks of ours are here
    uint32_t unsure_volume           # the search for chunks that are missing: place in the map's table
    uint32_t unsure_chunk
    uint32_t unsure_found            # in this round
    uint32_t unsure_generation       # the map's, and whether it was whole, when the round began
    bint unsure_whole
    uint64_t gone_told_ns
    uint64_t miss_volume[4096]
    uint32_t miss_segment[4096]
    uint32_t miss_count
    OpIds op_ids
    uint64_t reserved
    uint32_t unsynced_count
    bint intents_awaited             # by chunks that are to agree
    uint64_t learn_serial
    Peer* learn_peer                 # that had its turn last
    uint32_t learn_room              # a chunk has ended learning, others may begin: rounds to look for some
    uint64_t looked_ns               # when it was looked for some last
    uint32_t learn_reads             # copies that a pool thread reads
    uint32_t learn_volume            # the search for chunks that are to learn: place in the map's table
    uint32_t learn_chunk
    uint64_t learn_left              # found so far in this round
    uint32_t learn_told              # chunks that wait for the MDM's word on their learner
    bint learn_single                # of chunks with one copy
    bint learn_all                   # this round takes chunks with two copies too
    uint32_t learn_rate_count
    LearnRate learn_rates[64]
    uint32_t checks                  # KIND_CHECK operations there are
    Hopeless hopeless[64]
    uint32_t hopeless_next
    Scrub scrub
    int wait_ms                      # how long the loop may sleep
    bint purging
    bint stopping
    bint writeback_running
    uint64_t now_ns
    uint64_t next_tick_ns
    char* scratch                    # 4 MiB
    Counters counters
    Histogram read_histogram
    Histogram write_histogram
