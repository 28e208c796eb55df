# The data plane's protocol, whole: one frame header, the opcodes, the statuses, the limits, the handshake bodies.
# Little-endian, packed. A change here is a new WIRE_VERSION. Golden bytes: tests/golden/wire.json.
#
# A frame is: header (80 bytes), then body_length bytes. For an opcode that carries data the body is
#   check values: one uint32 per 4 KiB block touched   (see checksum.pxd for what they cover)
#   tags:         REPLICATE and TAGS only, see below
#   payload:      `length` bytes
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, int64_t

cdef enum:
    WIRE_MAGIC = 0x31564650          # the bytes "PFV1"
    WIRE_VERSION = 1
    HEADER_SIZE = 80
    BLOCK_SIZE = 4096
    BLOCK_SHIFT = 12
    CHUNK_SIZE = 4194304
    CHUNK_SHIFT = 22
    CHUNK_BLOCKS = 1024
    IO_SIZE_MAX = 1048576            # bytes of data in one frame
    IO_BLOCKS_MAX = 257              # an unaligned 1 MiB touches 257 blocks
    VERIFY_BLOCKS_MAX = 64           # of one VERIFY
    BODY_SIZE_MAX = 1069056          # bounds IO_SIZE_MAX and a block, with 257 check values and tags of 16 bytes
    CONTROL_BODY_MAX = 65536         # handshake, capability and list frames

cdef enum Opcode:
    # Handshake, spoken by the trio side before the socket goes to an engine.
    OP_HELLO = 1
    OP_CHALLENGE = 2
    OP_PROOF = 3
    OP_WELCOME = 4
    # SDC -> SDS
    OP_CAPABILITY = 16               # body: a capability signed by the MDM; answered OK or NOT_AUTHORIZED
    # FLAG_RESYNC in a READ: the last answer did not match its check values; the copies are to be looked at.
    OP_READ = 17                     # reply: checks + payload, or FLAG_ZEROS and no body
    OP_WRITE = 18                    # body: checks + payload
    OP_DISCARD = 19                  # whole blocks: [offset, offset + length) reads as zeros afterwards
    OP_FLUSH = 20                    # everything acknowledged so far for this volume is on this SDS's disks
    OP_SEEK = 21                     # reply body: one bit per block of the chunk, 1 = data (128 bytes)
    # SDS (primary) -> SDS (secondary or learner)
    OP_REPLICATE = 32                # body: checks + payload, whole blocks, all written as (epoch, seq)
    OP_REPLICATE_DISCARD = 33
    OP_DIRTY = 34                    # request: none; reply body: (volume u64, chunk u32, pad u32)*, paged: see wire.md
    # Reply body: 1024 tags of 16 bytes, or FLAG_ABSENT and no body; with FLAG_RESYNC too: it may have been lost.
    OP_TAGS = 35
    # In answers of PULL and VERIFY the tag of a block that does not match it is unknown (see ondisk.pxd).
    OP_PULL = 36                     # read with tags: reply body: checks (of the payload) + tags + payload
    OP_PUSH = 37                     # resync: body: checks + tags + payload, each block under its own tag
    # Lease renewal and liveness. Of a chunk, with FLAG_RESYNC: who left before this epoch serves no more; with
    # FLAG_ABSENT too: the copies have been compared, and agree.
    OP_PING = 38
    OP_VERIFY = 39                   # reply body: a tag of 16 bytes a block, or FLAG_ABSENT and no body
    # SDS (secondary) -> SDS (primary)
    # A block in this range did not match its tag: the copies are to be looked at. A whole chunk: it may be missing.
    OP_REPAIR = 40
    OP_REPLY = 128                   # added to the opcode of the request in its answer

cdef enum Flag:
    FLAG_ZEROS = 1                   # the whole range reads as zeros: no body
    FLAG_ABSENT = 2                  # the SDS holds no slot for the chunk
    FLAG_COMMIT = 4                  # acknowledge only when on disk
    FLAG_RESYNC = 8                  # REPLICATE/PUSH: apply also over an unknown block; READ: see there
    FLAG_REPLY_MORE = 16             # a paged answer goes on

cdef enum Status:
    ST_OK = 0
    ST_BAD_REQUEST = 1               # a field out of range: the connection is closed after it
    ST_NOT_AUTHORIZED = 2            # no capability for the volume on this connection
    ST_READ_ONLY = 3
    ST_STALE_MAP = 4                 # the epoch is not the SDS's: fetch the map again
    ST_NOT_MEMBER = 5                # this SDS does not serve the chunk (as primary, for a write)
    ST_NOT_READY = 6                 # no session with the pair's other half, or no map yet: try again
    ST_NO_SPACE = 7
    ST_IO_ERROR = 8                  # the host's disk said so
    ST_CHECKSUM = 9                  # the stored block does not match its tag
    ST_PAYLOAD = 10                  # the data received does not match its check value: send again
    ST_NO_VOLUME = 11                # the volume was deleted
    ST_RANGE = 12                    # past the end of the volume
    ST_SHUTTING_DOWN = 13
    ST_OLD_SESSION = 14              # a newer session of the same node has been admitted
    ST_BUSY = 15
    ST_COUNT = 16

cdef enum Role:
    ROLE_SDC = 1
    ROLE_SDS = 2

cdef packed struct Header:
    uint32_t magic
    uint8_t version
    uint8_t opcode
    uint16_t status                  # 0 in requests
    uint32_t flags
    uint32_t header_crc              # crc32c of the 80 bytes with this field zero
    uint64_t request_id              # echoed in the answer
    uint64_t volume_id
    uint32_t chunk_index
    uint32_t offset                  # bytes from the start of the chunk
    uint32_t length                  # bytes of user data the operation covers
    uint32_t body_length
    uint32_t epoch                   # the chunk's epoch as the sender knows it
    uint32_t node_id                 # the SDC whose operation this is (kept through replication)
    uint64_t seq                     # REPLICATE: the write's seq; WRITE's answer: the same; WRITE, DISCARD: op's place
    uint64_t op_id                   # the SDC's operation id, the same when it is sent again
    uint64_t incarnation             # requests: the sender's session, REPLICATE: op's place; answers: durability

# Closes the header (magic, version, crc); call last.
cdef void header_seal(Header* h) noexcept nogil
# 0 when magic, version, crc and every field's range hold; else a BadFrame code (below). Reads only the 80 bytes.
cdef int header_check(const Header* h) noexcept nogil
cdef const char* bad_frame_text(int code) noexcept nogil

cdef enum BadFrame:
    BAD_MAGIC = 1
    BAD_VERSION = 2
    BAD_CRC = 3
    BAD_OPCODE = 4
    BAD_STATUS = 5
    BAD_FLAGS = 6
    BAD_RANGE = 7                    # offset and length leave the chunk
    BAD_LENGTH = 8                   # length over IO_SIZE_MAX, or zero where data is due
    BAD_BODY = 9                     # body_length is not what opcode and length ask for
    BAD_ALIGNMENT = 10               # whole blocks were due
    BAD_COUNT = 11

cdef inline uint32_t blocks_touched(uint32_t offset, uint32_t length) noexcept nogil:
    return ((offset + length + BLOCK_SIZE - 1) >> BLOCK_SHIFT) - (offset >> BLOCK_SHIFT) if length else 0
