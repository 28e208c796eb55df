"""The files of a device: how they are made, and every check of a superblock before anything else is believed.

Owns the names and sizes of the files and the error that says what is wrong with one. Promises that a device is made
whole or not at all, that a superblock is replaced whole, and that a field out of range has a message of its own.
Knows no Device.
"""
from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t, int64_t
from libc.string cimport memcpy, memset
from posix.fcntl cimport O_CREAT, O_WRONLY
from posix.types cimport off_t
import contextlib
import os
import secrets
from datapath.checksum cimport crc32c
from datapath.journal cimport journal_half_size, journal_header_make, write_all
from datapath.ondisk cimport (
    DEVICE_INDEX_MAX, DISK_VERSION, INCARNATION_MAX, SDS_ID_MAX, SLOT_COUNT_MAX, SLOT_ENTRY_SIZE, SLOT_SIZE,
    SLOT_TAGS_SIZE, SUPERBLOCK_BLOCK, SUPERBLOCK_MAGIC, UNSURE_INTENTS, UNSURE_SLOTS, JournalHeader, SlotEntry,
    Superblock)

cdef extern from "<fcntl.h>" nogil:
    """
    #include <linux/falloc.h>
    #include <sys/types.h>
    extern int fallocate(int, int, off_t, off_t);
    """
    int fallocate(int fd, int mode, off_t offset, off_t size)
    int openat(int directory, const char* name, int flags, int mode)
    int O_CLOEXEC
    int FALLOC_FL_KEEP_SIZE
    int FALLOC_FL_PUNCH_HOLE

cdef extern from "<stdio.h>" nogil:
    """
    #ifndef RENAME_EXCHANGE
    #define RENAME_EXCHANGE 2
    #endif
    extern int renameat2(int, const char *, int, const char *, unsigned int);
    """
    int renameat2(int from_directory, const char* source, int to_directory, const char* target, unsigned int flags)
    unsigned int RENAME_EXCHANGE
    int renameat(int from_directory, const char* source, int to_directory, const char* target)

cdef extern from "<unistd.h>" nogil:
    int fsync(int fd)
    int c_close "close"(int fd)

cdef enum:
    BLOCK_SIZE = 4096

FILES = ("blocks", "slots", "tags", "journal")
BOOT_ID_PATH = "/proc/sys/kernel/random/boot_id"


class DeviceFormatError(ValueError):
    """A device that cannot be used as it is: the message names the file, the field and what is wrong with it."""


cdef raise_errno(int64_t result, path):
    if result < 0:
        raise OSError(-result, os.strerror(-result), path)


def boot_id_now():
    """The 16 bytes that name this boot of the host."""
    with open(BOOT_ID_PATH, encoding="ascii") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


cdef int superblock_write(int directory_fd, Superblock* superblock) noexcept nogil:
    """Replaces the superblock file, durably. The journal's lock is held, or nobody else has the device yet.

    The old file becomes the next new one, so that on a full disk a checkpoint needs no block.
    """
    cdef char[SUPERBLOCK_BLOCK] block
    cdef int fd, error
    superblock.crc = crc32c(0, superblock, sizeof(Superblock) - 4)
    memset(block, 0, SUPERBLOCK_BLOCK)
    memcpy(block, superblock, sizeof(Superblock))
    fd = openat(directory_fd, "superblock.new", O_WRONLY | O_CREAT | O_CLOEXEC, 0o600)
    if fd < 0:
        return -errno
    error = write_all(fd, block, SUPERBLOCK_BLOCK, 0)
    if not error and fsync(fd):
        error = -errno
    c_close(fd)
    if (not error and renameat2(directory_fd, "superblock.new", directory_fd, "superblock", RENAME_EXCHANGE)
            and renameat(directory_fd, "superblock.new", directory_fd, "superblock")):
        error = -errno
    if not error and fsync(directory_fd):
        error = -errno
    return error


cdef superblock_exchange(int directory_fd, path):
    if (renameat2(directory_fd, "superblock.new", directory_fd, "superblock", RENAME_EXCHANGE)
            and renameat(directory_fd, "superblock.new", directory_fd, "superblock") or fsync(directory_fd)):
        raise OSError(errno, os.strerror(errno), path)


cdef bytes id_bytes(value, what):
    value = bytes(value)
    if len(value) != 16:
        raise ValueError(f"a {what} has 16 bytes, not {len(value)}")
    return value


cdef require(bint good, file, message):
    if not good:
        raise DeviceFormatError(f"{file}: {message}")


cdef superblock_check(Superblock* s, file, cluster_id):
    """Reads and checks every field; messages name the file."""
    with open(file, "rb") as opened:
        data = opened.read(SUPERBLOCK_BLOCK + 1)
    require(len(data) == SUPERBLOCK_BLOCK, file, f"has {len(data)} bytes or more where {SUPERBLOCK_BLOCK} are due")
    memcpy(s, <const char*>data, sizeof(Superblock))
    require(s.magic == SUPERBLOCK_MAGIC, file, f"magic is {s.magic:#x}: not a device of pfvol")
    require(s.version == DISK_VERSION, file, f"format version is {s.version}, this program reads {DISK_VERSION}")
    require(s.size == sizeof(Superblock), file, f"size field is {s.size}, {sizeof(Superblock)} is due")
    crc = crc32c(0, s, sizeof(Superblock) - 4)
    require(s.crc == crc, file, f"checksum is {s.crc:#010x}, its content gives {crc:#010x}")
    require(not any(data[sizeof(Superblock):]), file, "there is something after the structure")
    owner = (<char*>s.cluster_id)[:16]
    require(any(owner), file, "cluster id is zero")
    if cluster_id is not None:
        require(owner == id_bytes(cluster_id, "cluster id"), file,
                f"the device belongs to another cluster ({owner.hex()})")
    require(any((<char*>s.device_id)[:16]), file, "device id is zero")
    require(s.sds_id <= SDS_ID_MAX, file, f"SDS id {s.sds_id} is over {SDS_ID_MAX}")
    require(s.device_index <= DEVICE_INDEX_MAX, file, f"device index {s.device_index} is over {DEVICE_INDEX_MAX}")
    require(1 <= s.slot_count <= SLOT_COUNT_MAX, file, f"slot count {s.slot_count} is not 1 to {SLOT_COUNT_MAX}")
    require(s.incarnation < INCARNATION_MAX, file,
            f"incarnation {s.incarnation} leaves no other below {INCARNATION_MAX}")
    require(s.durable_incarnation <= s.incarnation, file,
            f"durable incarnation {s.durable_incarnation} is over the incarnation {s.incarnation}")
    require(s.journal_generation >= 1, file, "journal generation is zero")
    require(s.clean <= 1, file, f"clean flag is {s.clean}, not 0 or 1")
    require(s.unsure <= UNSURE_SLOTS | UNSURE_INTENTS, file, f"unsure flags are {s.unsure:#x}")
    require(not any([s.reserved[i] for i in range(6)]), file, "reserved fields are not zero")


cdef bint superblock_rotten(file):
    """What is no superblock of any version: its checksum does not hold."""
    cdef Superblock s
    with open(file, "rb") as opened:
        data = opened.read(SUPERBLOCK_BLOCK)
    if len(data) < SUPERBLOCK_BLOCK:
        return True
    memcpy(&s, <const char*>data, sizeof(Superblock))
    return s.crc != crc32c(0, &s, sizeof(Superblock) - 4) or any(data[sizeof(Superblock):])


cdef bint superblock_parse(Superblock* s, path, cluster_id) except -1:
    """Whether the superblock had rotted, and is the one before it."""
    file = os.path.join(path, "superblock")
    try:
        superblock_check(s, file, cluster_id)
        return False
    except FileNotFoundError:
        raise DeviceFormatError(f"{path}: there is no superblock: not a device, or a half deleted one") from None
    except DeviceFormatError:
        if not superblock_rotten(file):
            raise
        try:
            superblock_check(s, file + ".new", cluster_id)
        except (OSError, DeviceFormatError):
            pass
        else:
            return True
        raise


cdef dict file_sizes(uint64_t slot_count):
    return {
        "blocks": slot_count * SLOT_SIZE,
        "slots": slot_count * SLOT_ENTRY_SIZE,
        "tags": slot_count * SLOT_TAGS_SIZE,
        "journal": 2 * journal_half_size(slot_count),
    }


cdef check_sizes(path, uint64_t slot_count):
    for name, size in file_sizes(slot_count).items():
        file = os.path.join(path, name)
        try:
            found = os.stat(file).st_size
        except FileNotFoundError:
            raise DeviceFormatError(f"{file}: the file is missing") from None
        require(found == size, file, f"has {found} bytes where {size} are due")
        require(os.path.isfile(file), file, "is not a regular file")


cdef preallocate(int fd, uint64_t size, file):
    if fallocate(fd, 0, 0, <off_t>size):
        raise OSError(errno, f"cannot preallocate {size} bytes: {os.strerror(errno)}", file)


cdef write_free_entries(int fd, uint64_t slot_count, file):
    cdef SlotEntry[1024] entries
    cdef uint64_t first
    cdef uint32_t i, count
    for first in range(0, slot_count, 1024):
        count = <uint32_t>min(<uint64_t>1024, slot_count - first)
        memset(entries, 0, sizeof(entries))
        for i in range(count):
            entries[i].slot = <uint32_t>(first + i)
            entries[i].crc = crc32c(0, &entries[i], SLOT_ENTRY_SIZE - 4)
        raise_errno(write_all(fd, entries, count * SLOT_ENTRY_SIZE, first * SLOT_ENTRY_SIZE), file)


cdef make_files(path, const Superblock* s):
    """Everything but the superblock, durable. The file system must be able to preallocate and to punch holes."""
    cdef JournalHeader header
    cdef int fd
    for name, size in file_sizes(s.slot_count).items():
        file = os.path.join(path, name)
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            if name in ("slots", "journal"):
                preallocate(fd, size, file)
            if name == "slots":
                write_free_entries(fd, s.slot_count, file)
            if name == "journal":
                journal_header_make(&header, s.journal_generation, s.device_id)
                os.pwrite(fd, (<char*>&header)[:sizeof(JournalHeader)],
                          (s.journal_generation % 2) * journal_half_size(s.slot_count))
            if name == "blocks" and fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, BLOCK_SIZE):
                raise OSError(errno, f"the file system cannot punch holes: {os.strerror(errno)}", file)
            os.fsync(fd)
        finally:
            os.close(fd)


cdef remove_unfinished(path):
    """What a creation left that was cut off. Nothing in it was ever in use: a device has its real name from the
    start.
    """
    for name in (*FILES, "superblock", "superblock.new"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(path, name))
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(path)


cdef sync_directory(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


cdef make_parents(path):
    """Durably: each directory's entry in the one above it, too."""
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        make_parents(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(parent)
        sync_directory(os.path.dirname(parent))


cdef create_device(path, bytes cluster_id, uint32_t sds_id, uint32_t index, size_bytes):
    """BlockDevice.create, of an absolute path."""
    cdef Superblock s
    cdef char[SUPERBLOCK_BLOCK] block
    slots = size_bytes // SLOT_SIZE
    if not 1 <= slots <= SLOT_COUNT_MAX:
        raise ValueError(f"a device has {SLOT_SIZE} to {<uint64_t>SLOT_COUNT_MAX * SLOT_SIZE} bytes, not {size_bytes}")
    if sds_id > SDS_ID_MAX or index > DEVICE_INDEX_MAX:
        raise ValueError(f"SDS {sds_id} or device index {index} is out of range")
    if not any(cluster_id):
        raise ValueError("the cluster id is zero")
    device_id = secrets.token_bytes(16)
    memset(&s, 0, sizeof(Superblock))
    s.magic, s.version, s.size = SUPERBLOCK_MAGIC, DISK_VERSION, sizeof(Superblock)
    memcpy(s.cluster_id, <const char*>(<bytes>cluster_id), 16)
    memcpy(s.device_id, <const char*>(<bytes>device_id), 16)
    s.sds_id, s.device_index, s.slot_count = sds_id, index, slots
    s.journal_generation, s.clean = 1, 1
    s.crc = crc32c(0, &s, sizeof(Superblock) - 4)
    memset(block, 0, SUPERBLOCK_BLOCK)
    memcpy(block, &s, sizeof(Superblock))
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise FileExistsError(f"{path} is there and not an empty directory")
    unfinished = path + ".unfinished"
    remove_unfinished(unfinished)
    make_parents(path)
    os.mkdir(unfinished, 0o700)
    try:
        make_files(unfinished, &s)
        for name in ("superblock", "superblock.new"):
            with open(os.path.join(unfinished, name), "xb") as file:
                file.write(block[:SUPERBLOCK_BLOCK])
                file.flush()
                os.fsync(file.fileno())
        sync_directory(unfinished)
        os.rename(unfinished, path)
    except BaseException:
        remove_unfinished(unfinished)
        raise
    sync_directory(os.path.dirname(path))
