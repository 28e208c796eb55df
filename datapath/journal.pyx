"""The intent journal: which chunks may hold what is not on disk yet, and which slots were given and taken.

Owns the journal file and the images of its halves. Promises that a record is read back after a crash only when
it was written whole, in its place, in its generation, and not by an older process behind the end of what this one
wrote; that no record of a generation is there without all of the one before it; and that ``durable`` rises only after
fdatasync said so.
"""
from libc.errno cimport EBADMSG, EINTR, EIO, ENOSPC, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t, int64_t
from libc.stddef cimport size_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.types cimport off_t
from datapath.checksum cimport crc32c
from datapath.disk cimport disk_fdatasync, disk_pread, disk_pwrite
from datapath.ondisk cimport (
    DISK_VERSION, JOURNAL_BLOCK, JOURNAL_DIRTY, JOURNAL_FREE, JOURNAL_MAGIC, JOURNAL_RECORD_SIZE,
    JOURNAL_RECORDS_EXTRA, JOURNAL_RECORDS_PER_SLOT, SLOT_NONE, JournalHeader, JournalRecord)

cdef enum:
    RECORDS_PER_BLOCK = 64           # JOURNAL_BLOCK / JOURNAL_RECORD_SIZE
    SCRATCH_SIZE = 262144            # bytes written or read at once


cdef int write_all(int fd, const void* data, size_t size, uint64_t offset) noexcept nogil:
    cdef ssize_t done
    while size:
        done = disk_pwrite(fd, data, size, <off_t>offset)
        if done < 0:
            if errno == EINTR:
                continue
            return -errno
        data = <const char*>data + done
        size -= done
        offset += done
    return 0


cdef int read_all(int fd, void* data, size_t size, uint64_t offset) noexcept nogil:
    cdef ssize_t done
    while size:
        done = disk_pread(fd, data, size, <off_t>offset)
        if done < 0:
            if errno == EINTR:
                continue
            return -errno
        if done == 0:
            return -EIO
        data = <char*>data + done
        size -= done
        offset += done
    return 0


cdef uint64_t journal_capacity(uint64_t slot_count) noexcept nogil:
    return slot_count * JOURNAL_RECORDS_PER_SLOT + JOURNAL_RECORDS_EXTRA


cdef uint64_t journal_half_size(uint64_t slot_count) noexcept nogil:
    cdef uint64_t blocks = (journal_capacity(slot_count) + RECORDS_PER_BLOCK - 1) // RECORDS_PER_BLOCK
    return (1 + blocks) * JOURNAL_BLOCK


cdef void journal_header_make(JournalHeader* header, uint64_t generation, const uint8_t* device_id) noexcept nogil:
    """The crc is that of the structure with its crc field zero."""
    memset(header, 0, sizeof(JournalHeader))
    header.magic = JOURNAL_MAGIC
    header.version = DISK_VERSION
    header.generation = generation
    memcpy(header.device_id, device_id, 16)
    header.crc = crc32c(0, header, sizeof(JournalHeader))


cdef size_t image_size(Journal* journal) noexcept nogil:
    return journal.half_size - JOURNAL_BLOCK


cdef Journal* journal_new(int fd, uint64_t slot_count, uint32_t incarnation, const uint8_t* device_id) noexcept nogil:
    cdef Journal* journal = <Journal*>calloc(1, sizeof(Journal))
    cdef void* image
    cdef int half
    if journal == NULL:
        return NULL
    pthread_mutex_init(&journal.lock, NULL)
    journal.fd = fd
    journal.incarnation = incarnation
    journal.capacity = journal_capacity(slot_count)
    journal.running = slot_count * (JOURNAL_RECORDS_PER_SLOT // 2) + JOURNAL_RECORDS_EXTRA
    journal.half_size = journal_half_size(slot_count)
    memcpy(journal.device_id, device_id, 16)
    journal.scratch = <char*>malloc(SCRATCH_SIZE)
    if journal.scratch == NULL:
        journal_delete(journal)
        return NULL
    for half in range(2):
        # Mapped, so that only what is used of it costs memory.
        image = mmap(NULL, image_size(journal), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if image == MAP_FAILED:
            journal_delete(journal)
            return NULL
        journal.halves[half].image = <JournalRecord*>image
    return journal


cdef void journal_delete(Journal* journal) noexcept nogil:
    cdef int half
    if journal == NULL:
        return
    for half in range(2):
        if journal.halves[half].image != NULL:
            munmap(journal.halves[half].image, image_size(journal))
    free(journal.scratch)
    pthread_mutex_destroy(&journal.lock)
    free(journal)


cdef int journal_read_header(Journal* journal, int half, uint64_t* generation) noexcept nogil:
    cdef JournalHeader header, expected
    cdef int error = read_all(journal.fd, &header, sizeof(JournalHeader), half * journal.half_size)
    if error:
        return error
    journal_header_make(&expected, header.generation, journal.device_id)
    if memcmp(&header, &expected, sizeof(JournalHeader)) == 0 and header.generation % 2 == <uint64_t>half:
        generation[0] = header.generation
        return 1
    return 0 if is_blank(&header, sizeof(JournalHeader)) else -EBADMSG


cdef uint32_t record_crc(const JournalRecord* record) noexcept nogil:
    return crc32c(0, <const char*>record + 4, JOURNAL_RECORD_SIZE - 4)


cdef bint is_blank(const void* data, size_t size) noexcept nogil:
    cdef const uint8_t* byte = <const uint8_t*>data
    cdef size_t at
    for at in range(size):
        if byte[at]:
            return False
    return True


cdef bint record_good(const JournalRecord* record, uint64_t generation, uint64_t index, uint32_t incarnation_min,
                      uint32_t incarnation_max, uint32_t slot_count) noexcept nogil:
    """The record is whole, in its place, and the next thing that was written in its generation."""
    if record.crc != record_crc(record) or record.generation != generation or record.index != index:
        return False
    if record.incarnation < incarnation_min or record.incarnation > incarnation_max:
        return False
    if record.kind == JOURNAL_DIRTY and record.slot == <uint32_t>SLOT_NONE:
        return True
    return JOURNAL_DIRTY <= record.kind <= JOURNAL_FREE and record.slot < slot_count


cdef int64_t journal_read_records(Journal* journal, uint64_t generation, uint32_t slot_count) noexcept nogil:
    cdef int half = generation % 2
    cdef JournalRecord* records = journal.halves[half].image
    cdef uint64_t start = half * journal.half_size + JOURNAL_BLOCK
    cdef uint64_t index = 0, readable = 0
    cdef uint32_t incarnation = 0
    cdef size_t size
    cdef int error
    while index < journal.capacity:
        if index == readable:
            size = min(<size_t>SCRATCH_SIZE, image_size(journal) - readable * JOURNAL_RECORD_SIZE)
            error = read_all(journal.fd, records + readable, size, start + readable * JOURNAL_RECORD_SIZE)
            if error:
                return error
            readable += size // JOURNAL_RECORD_SIZE
        if not record_good(records + index, generation, index, incarnation, journal.incarnation, slot_count):
            break
        incarnation = records[index].incarnation
        index += 1
    return <int64_t>index


cdef int journal_rotten(Journal* journal, uint64_t generation, uint64_t count) noexcept nogil:
    cdef int half = generation % 2
    cdef JournalRecord* record = journal.halves[half].image + count
    cdef uint64_t start = half * journal.half_size + JOURNAL_BLOCK
    cdef uint64_t at = count
    cdef size_t size, i
    cdef int error
    if count == journal.capacity:
        return 0
    # Sectors are written whole, and no record lies across two: what is here was written so, or never.
    if record.crc != record_crc(record) and not is_blank(record, JOURNAL_RECORD_SIZE):
        return 1
    while at < journal.capacity:
        size = min(<size_t>SCRATCH_SIZE, (journal.capacity - at) * JOURNAL_RECORD_SIZE)
        error = read_all(journal.fd, journal.scratch, size, start + at * JOURNAL_RECORD_SIZE)
        if error:
            return error
        for i in range(size // JOURNAL_RECORD_SIZE):
            record = <JournalRecord*>journal.scratch + i
            if record.generation == generation and record.settled > count and record.crc == record_crc(record):
                return 1
        at += size // JOURNAL_RECORD_SIZE
    return 0


cdef void journal_resume(Journal* journal, uint64_t generation, uint64_t count) noexcept nogil:
    journal.halves[generation % 2].generation = generation
    journal.halves[generation % 2].first = 0
    journal.generation = generation
    journal.header_durable = generation
    journal.appended = count
    journal.durable = count


cdef int64_t journal_append(Journal* journal, uint64_t limit, uint32_t kind, uint64_t volume_id, uint32_t chunk_index,
                            uint32_t slot, uint32_t epoch) noexcept nogil:
    cdef JournalHalf* half = &journal.halves[journal.generation % 2]
    cdef uint64_t index = journal.appended - half.first
    cdef uint64_t durable = pfvol_load(&journal.durable)
    cdef JournalRecord* record
    if index >= limit:
        return -ENOSPC
    record = half.image + index
    memset(record, 0, sizeof(JournalRecord))
    record.kind = kind
    record.generation = half.generation
    record.index = index
    record.volume_id = volume_id
    record.chunk_index = chunk_index
    record.slot = slot
    record.epoch = epoch
    record.incarnation = journal.incarnation
    record.settled = <uint32_t>(durable - half.first) if durable > half.first else 0
    record.crc = record_crc(record)
    pfvol_store(&journal.appended, journal.appended + 1)
    return <int64_t>journal.appended


cdef uint64_t journal_begin(Journal* journal) noexcept nogil:
    cdef uint64_t generation = journal.generation + 1
    cdef JournalHalf* half = &journal.halves[generation % 2]
    half.generation = generation
    half.first = journal.appended
    pfvol_store(&journal.generation, generation)
    return generation


cdef int write_records(Journal* journal, JournalHalf* half, uint64_t begin, uint64_t end) noexcept nogil:
    """Writes the records counted [begin, end) of a half, as whole blocks that end in zeros. journal.lock is held.

    The record after the last one is zeros then, too: what is there otherwise has rotted (journal_rotten).
    The blocks are put together in the scratch buffer: the shard may be building the record after ``end`` in the image.
    """
    cdef uint64_t last = end - half.first
    cdef uint64_t at = (begin - half.first) // RECORDS_PER_BLOCK * RECORDS_PER_BLOCK
    cdef uint64_t start = (half.generation % 2) * journal.half_size + JOURNAL_BLOCK
    cdef size_t used, size
    cdef int error
    while at < last:
        used = min((last - at) * JOURNAL_RECORD_SIZE, <uint64_t>SCRATCH_SIZE)
        size = (used + JOURNAL_BLOCK - 1) // JOURNAL_BLOCK * JOURNAL_BLOCK
        memcpy(journal.scratch, half.image + at, used)
        memset(journal.scratch + used, 0, size - used)
        error = write_all(journal.fd, journal.scratch, size, start + at * JOURNAL_RECORD_SIZE)
        if error:
            return error
        at += used // JOURNAL_RECORD_SIZE
    if last % RECORDS_PER_BLOCK == 0 and last < journal.capacity:
        memset(journal.scratch, 0, JOURNAL_BLOCK)
        return write_all(journal.fd, journal.scratch, JOURNAL_BLOCK, start + last * JOURNAL_RECORD_SIZE)
    return 0


cdef int write_header(Journal* journal, uint64_t generation) noexcept nogil:
    cdef uint64_t offset = (generation % 2) * journal.half_size
    memset(journal.scratch, 0, JOURNAL_BLOCK)
    journal_header_make(<JournalHeader*>journal.scratch, generation, journal.device_id)
    return write_all(journal.fd, journal.scratch, JOURNAL_BLOCK, offset)


cdef int journal_commit(Journal* journal) noexcept nogil:
    cdef int error
    pthread_mutex_lock(&journal.lock)
    error = journal_commit_locked(journal)
    pthread_mutex_unlock(&journal.lock)
    return error


cdef int journal_commit_locked(Journal* journal) noexcept nogil:
    # In this order: when a generation begins between the two loads, it begins at or after `appended`. A second one
    # cannot begin, because the first has not been voided, and voiding takes the lock that is held here. So what is not
    # durable is in the open half and the one before it, and neither is being reused.
    cdef uint64_t appended = pfvol_load(&journal.appended)
    cdef uint64_t generation = pfvol_load(&journal.generation)
    cdef JournalHalf* newer = &journal.halves[generation % 2]
    cdef JournalHalf* older = &journal.halves[(generation + 1) % 2]
    cdef int error = 0
    if journal.durable == appended and journal.header_durable == generation:
        return 0
    if journal.durable < newer.first:
        error = write_records(journal, older, journal.durable, min(appended, newer.first))
        # A record may be on the disk only after all before it. Within a half the reader sees to that, it ends at a gap;
        # between the halves it would take the newer one's records for the word after those that are missing.
        if not error and appended > newer.first and disk_fdatasync(journal.fd):
            error = -errno
    if not error and journal.header_durable < generation:
        error = write_header(journal, generation)
        if not error and appended <= newer.first:
            error = write_records(journal, newer, newer.first, newer.first)
    if not error and appended > newer.first:
        error = write_records(journal, newer, max(journal.durable, newer.first), appended)
    if not error and disk_fdatasync(journal.fd):
        error = -errno
    if not error:
        journal.header_durable = generation
        pfvol_store(&journal.durable, appended)
    return error
