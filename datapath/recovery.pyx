"""Crash recovery of one device: journal, slot table and tags are made to agree again.

Assumes an open, locked device whose superblock and file sizes are good. Promises that afterwards no block verifies
whose bytes are not those of its tag, that every chunk which may differ from its other copy is reported dirty, and that
what cannot be told is reported as lost, never guessed. Running it again after a crash in the middle gives the same.

What rot does is told apart from what a crash leaves, and costs no more than it has to: an entry with one bad byte is
mended if the tags vouch for it; without all intents every chunk is dirty; and where a chunk may have gone without a
trace, the device is `unsure`: a chunk that is in no slot counts as lost, not as never written.

What makes it right: data is written only after the chunk's ALLOC or DIRTY record is durable, holes are punched only
after the FREE record is, and a record lives until everything before it was synced. So the journal's last word on a
slot counts, and an entry that was written in a live generation without a record comes from an operation that nobody
was told had worked.
"""
from libc.errno cimport EBADMSG, ENXIO, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t, int64_t
from libc.stddef cimport size_t
from libc.stdlib cimport calloc, free, malloc
from posix.types cimport off_t
import os
from datapath.device cimport Device, device_offset, device_tags
from datapath.disk cimport disk_reserve
from datapath.checksum cimport block_seed, check_zero_block, crc32c
from datapath.journal cimport (
    Journal, is_blank, journal_read_header, journal_read_records, journal_resume, journal_rotten, read_all)
from datapath.ondisk cimport (
    JOURNAL_ALLOC, JOURNAL_DIRTY, JOURNAL_FREE, SLOT_ENTRY_SIZE, SLOT_FREE, SLOT_LOST, SLOT_NONE, SLOT_SIZE,
    SLOT_TAGS_SIZE, SLOT_USED, TAG_UNKNOWN, SEQ_MASK, TAGS_PER_SLOT, UNSURE_INTENTS, JournalRecord, SlotEntry, Tag)
from datapath.tags cimport tag_check, tag_is_blank, tag_set, tag_set_never

cdef enum:
    BLOCK_SIZE = 4096

cdef struct SlotState:
    const JournalRecord* last        # the journal's last word on the slot, NULL when it says nothing
    bint fresh                       # given out in a live generation: a blank tag was never written
    bint dirty

cdef struct Used:
    uint64_t volume_id
    uint32_t chunk_index
    uint32_t slot

cdef extern from "<unistd.h>" nogil:
    """
    #ifndef SEEK_DATA
    #define SEEK_DATA 3
    #endif
    """
    off_t lseek(int fd, off_t offset, int whence)
    int SEEK_DATA

cdef extern from "<stdlib.h>" nogil:
    void qsort(void* base, size_t count, size_t size, int (*compare)(const void*, const void*) noexcept nogil)


cdef int compare_used(const void* left, const void* right) noexcept nogil:
    cdef const Used* a = <const Used*>left
    cdef const Used* b = <const Used*>right
    if a.volume_id != b.volume_id:
        return 1 if a.volume_id > b.volume_id else -1
    if a.chunk_index != b.chunk_index:
        return 1 if a.chunk_index > b.chunk_index else -1
    return 1 if a.slot > b.slot else -1


cdef bint entry_good(const SlotEntry* entry, uint32_t slot) noexcept nogil:
    if entry.crc != crc32c(0, entry, SLOT_ENTRY_SIZE - 4) or entry.slot != slot:
        return False
    return entry.state <= SLOT_LOST


cdef void entry_write(SlotEntry* entry, uint32_t slot, uint32_t state, uint64_t volume_id, uint32_t chunk_index,
                      uint32_t epoch, uint64_t generation) noexcept nogil:
    entry.volume_id = volume_id
    entry.chunk_index = chunk_index
    entry.state = state
    entry.epoch = epoch
    entry.generation = <uint32_t>generation
    entry.slot = slot
    entry.crc = crc32c(0, entry, SLOT_ENTRY_SIZE - 4)


cdef bint entry_mend(SlotEntry* entry, uint32_t slot) noexcept nogil:
    """Undoes damage to a single byte, if there is one way to do that."""
    cdef SlotEntry found
    cdef uint8_t* bytes = <uint8_t*>entry
    cdef uint32_t at, flip, ways = 0
    for at in range(<uint32_t>SLOT_ENTRY_SIZE):
        for flip in range(1, 256):
            bytes[at] ^= flip
            if entry_good(entry, slot):
                found = entry[0]
                ways += 1
            bytes[at] ^= flip
    if ways == 1:
        entry[0] = found
    return ways == 1


cdef int check_tags(Tag* tags, uint64_t volume_id, uint32_t chunk_index, const char* data, bint fresh,
                    int* never_count) noexcept nogil:
    """Makes each tag of a slot true of its bytes: a mismatch becomes unknown. Returns how many did."""
    cdef uint32_t block, check
    cdef int unknown = 0
    cdef Tag* tag
    for block in range(<uint32_t>TAGS_PER_SLOT):
        tag = tags + block
        check = crc32c(block_seed(volume_id, chunk_index, block), data + <size_t>block * BLOCK_SIZE, BLOCK_SIZE)
        if not tag_is_blank(tag) and check == tag_check(tag):
            continue
        if tag_is_blank(tag) and fresh and check == check_zero_block(volume_id, chunk_index, block):
            tag_set_never(tag, volume_id, chunk_index, block)
            never_count[0] += 1
            continue
        # The name of the write stays, for what it is worth: the flag says that these bytes are perhaps not its.
        tag_set(tag, check, tag.epoch, (tag.seq & SEQ_MASK) | TAG_UNKNOWN)
        unknown += 1
    return unknown


cdef class Recovery:
    """One run. The arrays live as long as the object."""
    cdef Device* device
    cdef Journal* journal
    cdef SlotState* states
    cdef char* scratch
    cdef uint64_t base               # the oldest live generation
    cdef uint64_t open_generation
    cdef bint damaged                # intents may be missing: everything counts as dirty
    cdef bint restored               # the superblock had rotted, what is here is the one before it
    cdef uint32_t mended             # entries that had rotted and are known all the same
    cdef object name
    cdef set freed                   # chunks whose slot was taken in a live generation
    cdef dict freed_in               # the newest generation that tells so of each that one of them does
    cdef list punch, lost, lost_reasons, changed

    def __cinit__(self):
        self.states = NULL
        self.scratch = NULL

    def __dealloc__(self):
        free(self.states)
        free(self.scratch)

    cdef start(self, Device* device, Journal* journal, bint restored, object name):
        self.device = device
        self.journal = journal
        self.name = name
        self.base = device.superblock.journal_generation
        self.restored = restored
        self.states = <SlotState*>calloc(device.slot_count, sizeof(SlotState))
        self.scratch = <char*>malloc(SLOT_SIZE)
        if self.states == NULL or self.scratch == NULL:
            raise MemoryError()
        self.freed, self.freed_in = set(), {}
        self.punch, self.lost, self.lost_reasons, self.changed = [], [], [], []

    cdef tuple header(self, int half):
        """``(found, generation)``: 1 good, 0 never written, -EBADMSG."""
        cdef uint64_t generation = 0
        cdef int found = journal_read_header(self.journal, half, &generation)
        if found < 0 and found != -EBADMSG:
            raise OSError(-found, os.strerror(-found), self.name)
        return found, generation

    cdef int64_t read(self, uint64_t generation) except -1:
        """Takes the generation's records; each says itself that it is one of them. Returns how many."""
        cdef int64_t count = journal_read_records(self.journal, generation, self.device.slot_count)
        cdef int rotten
        if count < 0:
            raise OSError(<int>-count, os.strerror(<int>-count), self.name)
        rotten = journal_rotten(self.journal, generation, count)
        if rotten < 0:
            raise OSError(-rotten, os.strerror(-rotten), self.name)
        self.damaged = self.damaged or rotten
        self.take_records(generation, count)
        return count

    cdef uint64_t replay(self) except? 0:
        """Reads the live generations, oldest first. Returns how many records there were."""
        cdef int64_t count, more = 0
        found, generation = self.header(self.base % 2)
        found_other, other = self.header((self.base + 1) % 2)
        if self.restored and found == 1 == found_other and generation == self.base + 2 and other == self.base + 1:
            # The superblock that was lost had voided one generation more.
            self.base += 1
            self.device.superblock.journal_generation = self.base
            generation, other = other, generation
        newer = found_other == 1 and other == self.base + 1
        # The other half is one generation older or newer, or empty in a new device. Anything else may have lost
        # intents.
        older = (found_other == 1 and other + 1 == self.base) or (found_other == 0 and self.base == 1)
        self.damaged = (found != 1 or generation != self.base or not (newer or older)
                        or self.device.superblock.unsure & UNSURE_INTENTS)
        count = self.read(self.base)
        self.open_generation = self.base
        if not older:
            more = self.read(self.base + 1)
            if newer or more:
                self.open_generation = self.base + 1
        journal_resume(self.journal, self.open_generation, count if self.open_generation == self.base else more)
        return count + more

    cdef take_records(self, uint64_t generation, int64_t count):
        cdef const JournalRecord* record = self.journal.halves[generation % 2].image
        cdef const JournalRecord* end = record + count
        cdef SlotState* state
        while record < end:
            if record.slot == <uint32_t>SLOT_NONE or record.kind == JOURNAL_FREE:
                chunk = (record.volume_id, record.chunk_index)
                self.freed.add(chunk)
                self.freed_in[chunk] = generation
            if record.slot != <uint32_t>SLOT_NONE:
                state = &self.states[record.slot]
                state.fresh = record.kind == JOURNAL_ALLOC or (state.fresh and record.kind == JOURNAL_DIRTY)
                state.dirty = record.kind != JOURNAL_FREE
                state.last = record
            record += 1

    cdef write(self, uint32_t slot, uint32_t state, uint64_t volume_id, uint32_t chunk_index, uint32_t epoch,
               uint64_t generation):
        entry_write(self.device.slots + slot, slot, state, volume_id, chunk_index, epoch, generation)
        self.changed.append(slot)

    cdef lose(self, uint32_t slot, reason):
        cdef SlotEntry* entry = self.device.slots + slot
        self.lost.append(slot)
        self.lost_reasons.append(f"slot {slot}: {reason}")
        self.states[slot].dirty = False
        # No crash leaves this: a damaged or contradictory entry is out of the way of whoever walks the table.
        self.write(slot, SLOT_LOST, entry.volume_id, entry.chunk_index, entry.epoch, entry.generation)

    cdef settle_told(self, uint32_t slot):
        """A slot that the journal speaks of."""
        cdef SlotEntry* entry = self.device.slots + slot
        cdef const JournalRecord* last = self.states[slot].last
        cdef bint good = entry_good(entry, slot)
        cdef bint same, taken_back
        self.mended += not good
        if last.kind == JOURNAL_FREE:
            self.write(slot, SLOT_FREE, last.volume_id, last.chunk_index, last.epoch, last.generation)
            self.punch.append(slot)
            return
        same = good and entry.volume_id == last.volume_id and entry.chunk_index == last.chunk_index
        if same and entry.state == SLOT_USED:
            return
        # Taken, but the record did not reach the disk: nothing was punched, so the chunk still has it.
        taken_back = same and entry.state == SLOT_FREE and self.live(entry)
        if last.kind == JOURNAL_DIRTY and good and not self.states[slot].fresh and not taken_back:
            # The ALLOC is older than the journal, so the entry was synced with another content: both cannot be true.
            self.lose(slot, "the slot table and the journal name different chunks")
            return
        self.write(slot, SLOT_USED, last.volume_id, last.chunk_index, last.epoch, last.generation)

    cdef settle_rotten(self, uint32_t slot):
        """A damaged entry of which the journal does not speak."""
        cdef SlotEntry* entry = self.device.slots + slot
        if not self.holds_something(slot):
            # A slot in use has tags, unless its record never became durable and nobody was told.
            self.write(slot, SLOT_FREE, 0, 0, 0, self.base - 1)
            self.mended += 1
        elif entry_mend(entry, slot) and entry.state == SLOT_USED and self.vouched_for(slot):
            self.changed.append(slot)
            self.mended += 1
            self.states[slot].dirty = True                 # read once, all of it
        else:
            self.lose(slot, "its entry in the slot table is damaged")

    cdef settle_untold(self, uint32_t slot):
        """A slot that the journal does not speak of, whose entry is not plainly old and good."""
        cdef SlotEntry* entry = self.device.slots + slot
        if not entry_good(entry, slot):
            self.settle_rotten(slot)
        elif entry.state == SLOT_LOST:
            self.lose(slot, "an earlier recovery could not tell what it holds")
        elif entry.state == SLOT_USED:
            # Given out, but the record did not reach the disk: nothing was written, blank tags say so.
            self.states[slot].fresh = self.live(entry)
            self.states[slot].dirty = True
        elif self.live(entry):
            self.freed.add((entry.volume_id, entry.chunk_index))
            self.punch.append(slot)
        elif self.holds_something(slot):
            self.lose(slot, "it is free and yet there is something in it")

    cdef bint holds_something(self, uint32_t slot) except -1:
        cdef off_t begin = <off_t>slot * SLOT_SIZE, data
        if not is_blank(device_tags(self.device, slot), SLOT_TAGS_SIZE):
            return True
        data = lseek(self.device.block_fd, begin, SEEK_DATA)
        if data < 0 and errno != ENXIO:
            raise OSError(errno, os.strerror(errno), self.name)
        return begin <= data < begin + SLOT_SIZE

    cdef bint vouched_for(self, uint32_t slot) except -1:
        """Whether a block of the slot is one of the chunk that the entry names."""
        cdef const SlotEntry* entry = self.device.slots + slot
        cdef const Tag* tags = device_tags(self.device, slot)
        cdef uint32_t block
        cdef int error
        with nogil:
            error = read_all(self.device.block_fd, self.scratch, SLOT_SIZE, device_offset(slot))
        if error:
            raise OSError(-error, os.strerror(-error), self.name)
        for block in range(<uint32_t>TAGS_PER_SLOT):
            if not tag_is_blank(tags + block) and tag_check(tags + block) == crc32c(
                    block_seed(entry.volume_id, entry.chunk_index, block), self.scratch + <size_t>block * BLOCK_SIZE,
                    BLOCK_SIZE):
                return True
        return False

    cdef bint live(self, const SlotEntry* entry) noexcept:
        """The entry was written in a live generation (the comparison holds across the wrap of the low half)."""
        return <uint32_t>(entry.generation - <uint32_t>self.base) < 0x80000000u

    cdef uint32_t settle(self) except? 0xffffffff:
        """Makes the slot table agree with the journal. Returns how many slots are used."""
        cdef SlotEntry* entry
        cdef uint32_t slot, used = 0
        for slot in range(self.device.slot_count):
            entry = self.device.slots + slot
            if self.states[slot].last != NULL:
                self.settle_told(slot)
            elif self.damaged or not entry_good(entry, slot) or entry.state == SLOT_LOST or self.live(entry):
                self.settle_untold(slot)
            if entry.state == SLOT_USED:
                used += 1
        return used

    cdef refuse_twins(self, uint32_t used):
        """No chunk has two slots: the one whose record never became durable goes, else both are lost."""
        cdef Used* all = <Used*>malloc((used + 1) * sizeof(Used))
        cdef SlotEntry* entry
        cdef uint32_t slot, count = 0
        cdef size_t i
        if all == NULL:
            raise MemoryError()
        try:
            for slot in range(self.device.slot_count):
                entry = self.device.slots + slot
                if entry.state == SLOT_USED:
                    all[count].volume_id = entry.volume_id
                    all[count].chunk_index = entry.chunk_index
                    all[count].slot = slot
                    count += 1
            qsort(all, count, sizeof(Used), compare_used)
            for i in range(1, count):
                if all[i].volume_id == all[i - 1].volume_id and all[i].chunk_index == all[i - 1].chunk_index:
                    # The survivor takes part in the next comparison.
                    all[i].slot = self.one_of(all[i - 1].slot, all[i].slot)
        finally:
            free(all)

    cdef uint32_t one_of(self, uint32_t first, uint32_t second) except? 0xffffffff:
        cdef uint32_t slot
        cdef SlotEntry* entry
        for slot in (second, first):
            entry = self.device.slots + slot
            if self.states[slot].last == NULL and self.states[slot].fresh:
                self.states[slot].dirty = False
                self.write(slot, SLOT_FREE, entry.volume_id, entry.chunk_index, entry.epoch, entry.generation)
                self.punch.append(slot)
                return first if slot == second else second
        for slot, other in ((first, second), (second, first)):
            if self.device.slots[slot].state == SLOT_USED:
                self.lose(slot, f"the chunk is in slot {other} too")
        return second

    cdef tuple verify(self):
        """Reads every dirty slot. Returns (dirty, unknown blocks, never-written blocks restored)."""
        cdef SlotEntry* entry
        cdef uint32_t slot
        cdef int error, unknown = 0, never = 0, total_unknown = 0
        dirty = []
        for slot in range(self.device.slot_count):
            if not self.states[slot].dirty:
                continue
            entry = self.device.slots + slot
            with nogil:
                error = read_all(self.device.block_fd, self.scratch, SLOT_SIZE, device_offset(slot))
                # A preallocation that was not synced may be gone: the stores that follow must find room.
                if not error and disk_reserve(self.device.tag_fd, <off_t>slot * SLOT_TAGS_SIZE, SLOT_TAGS_SIZE):
                    error = -errno
                if not error:
                    unknown = check_tags(device_tags(self.device, slot), entry.volume_id, entry.chunk_index,
                                         self.scratch, self.states[slot].fresh, &never)
            if error:
                raise OSError(-error, os.strerror(-error), self.name)
            total_unknown += unknown
            dirty.append((entry.volume_id, entry.chunk_index, slot))
        return dirty, total_unknown, never

    cdef list carry(self, list dirty):
        """What the open generation does not tell yet."""
        cdef const JournalRecord* last
        told = []
        for volume_id, chunk_index, slot in dirty:
            last = self.states[<uint32_t>slot].last
            if last == NULL or last.generation != self.open_generation:
                told.append((volume_id, chunk_index, slot, self.device.slots[<uint32_t>slot].epoch))
        told += [(volume_id, chunk_index, <uint32_t>SLOT_NONE, 0)
                 for volume_id, chunk_index in sorted(self.freed)
                 if self.freed_in.get((volume_id, chunk_index)) != self.open_generation]
        return told

    cdef dict run(self):
        records = self.replay()
        cdef uint32_t used = self.settle()
        self.refuse_twins(used)
        dirty, unknown, never = self.verify()
        present = {(volume_id, chunk_index) for volume_id, chunk_index, _ in dirty}
        self.freed -= present
        return {
            "records": records,
            "generations": self.open_generation - self.base + 1,
            "journal_damaged": bool(self.damaged),
            "superblock_restored": bool(self.restored),
            "mended": self.mended,
            "dirty": dirty,
            "freed": sorted(self.freed),
            "lost": sorted(self.lost),
            "lost_reasons": self.lost_reasons,
            "unknown_blocks": unknown,
            "never_blocks": never,
            "punch": self.punch,
            "carry": self.carry(dirty),
            "changed": self.changed,
        }


cdef dict recover_device(Device* device, Journal* journal, bint restored, object name):
    recovery = Recovery()
    recovery.start(device, journal, restored, name)
    return recovery.run()
