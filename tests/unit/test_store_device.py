"""A device: made, opened, refused when a field is wrong, its slots, journal and checkpoints."""

import errno
import os
import random
import struct
import subprocess
import sys
import time

import crcmod.predefined
import pytest

from datapath import checksum, tags
from datapath.blockfile import NO_SLOT, BlockDevice, DeviceFormatError

CLUSTER = bytes(range(16))
BOOT = b"a boot of a host"
MIB = 1 << 20
crc32c = crcmod.predefined.mkCrcFun("crc-32c")

SUPERBLOCK = struct.Struct("<QII16s16sIIQQQQ16sII24sI")
SUPERBLOCK_FIELDS = [
    *("magic", "version", "size", "cluster_id", "device_id", "sds_id", "device_index", "slot_count", "incarnation"),
    *("durable_incarnation", "journal_generation", "boot_id", "clean", "unsure", "reserved", "crc"),
]


def superblock_read(path):
    fields = SUPERBLOCK.unpack((path / "superblock").read_bytes()[: SUPERBLOCK.size])
    return dict(zip(SUPERBLOCK_FIELDS, fields, strict=True))


def superblock_write(path, fields, *, seal=True):
    packed = SUPERBLOCK.pack(*fields.values())
    if seal:
        packed = packed[:-4] + struct.pack("<I", crc32c(packed[:-4]))
    (path / "superblock").write_bytes(packed.ljust(4096, b"\0"))


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "dev0"
    BlockDevice.create(made, cluster_id=CLUSTER, sds_id=3, index=2, size_bytes=32 * MIB)
    return made


@pytest.fixture
def device(path):
    opened = BlockDevice.open(path, cluster_id=CLUSTER, boot_id=BOOT)
    opened.recover()
    yield opened
    opened.close(clean=False)


# -- create and open


def test_a_new_device_is_empty_and_costs_next_to_nothing(path, device):
    assert (device.size, device.slots, device.used, device.free) == (32 * MIB, 8, 0, 8)
    assert (device.sds_id, device.index, device.incarnation, device.durable_incarnation) == (3, 2, 1, 1)
    assert device.cluster_id == CLUSTER
    assert len(device.device_id) == 16
    assert (path / "blocks").stat().st_size == 32 * MIB
    assert sum(file.stat().st_blocks * 512 for file in path.iterdir()) < 100_000


@pytest.mark.parametrize("size", [0, -1, 4 * MIB - 1, (1 << 46) + 4 * MIB])
def test_sizes_out_of_range_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match="a device has 4194304 to"):
        BlockDevice.create(tmp_path / "d", cluster_id=CLUSTER, size_bytes=size)
    assert list(tmp_path.iterdir()) == []


def test_identities_out_of_range_are_refused(tmp_path):
    for wrong in ({"sds_id": 65536}, {"index": 65536}, {"cluster_id": bytes(16)}, {"cluster_id": b"short"}):
        with pytest.raises(ValueError, match=r"out of range|cluster id"):
            BlockDevice.create(tmp_path / "d", **{"cluster_id": CLUSTER, "size_bytes": 4 * MIB, **wrong})


def test_create_overwrites_nothing(tmp_path, path):
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(FileExistsError):
        BlockDevice.create(path, cluster_id=CLUSTER, size_bytes=4 * MIB)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        BlockDevice.create(tmp_path / "file", cluster_id=CLUSTER, size_bytes=4 * MIB)


def test_create_takes_an_empty_directory_and_clears_what_a_cut_off_creation_left(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d.unfinished").mkdir()
    (tmp_path / "d.unfinished" / "blocks").write_bytes(b"half")
    BlockDevice.create(tmp_path / "d", cluster_id=CLUSTER, size_bytes=4 * MIB)
    assert [entry.name for entry in tmp_path.iterdir()] == ["d"]


def test_two_openers_cannot_have_one_device(path, device):
    with pytest.raises(OSError, match="in use by another process") as caught:
        BlockDevice.open(path)
    assert caught.value.errno == errno.EBUSY
    script = f"from datapath.blockfile import BlockDevice; BlockDevice.open({str(path)!r})"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "in use by another process" in other.stderr
    device.close()
    BlockDevice.open(path).close()


def test_a_closed_device_says_so(device):
    device.close()
    device.close()
    for call in (device.sync, device.commit, device.recover, lambda: device.alloc(1, 1), lambda: device.generation):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_nothing_is_served_before_recovery(path):
    device = BlockDevice.open(path)
    with pytest.raises(OSError, match="Invalid argument"):
        device.alloc(1, 1)
    device.recover()
    with pytest.raises(RuntimeError, match="recovered already"):
        device.recover()
    device.close()


def test_each_start_is_an_incarnation_and_each_boot_a_durable_one(path):
    seen = []
    for boot in (b"1" * 16, b"1" * 16, b"2" * 16, b"2" * 16):
        device = BlockDevice.open(path, boot_id=boot)
        seen.append((device.incarnation, device.durable_incarnation))
        device.close(clean=False)
    assert seen == [(1, 1), (2, 1), (3, 3), (4, 3)]


def test_the_devices_of_an_sds_share_an_incarnation(path):
    device = BlockDevice.open(path, boot_id=BOOT)
    device.set_sds(3, 40)
    assert (device.incarnation, device.durable_incarnation) == (40, 40)
    with pytest.raises(ValueError, match="incarnation 39 is not 40 to"):
        device.set_sds(3, 39)
    with pytest.raises(DeviceFormatError, match="belongs to SDS 3, not 4"):
        device.set_sds(4, 41)
    device.close()
    device = BlockDevice.open(path, boot_id=BOOT)
    assert (device.incarnation, device.durable_incarnation, device.sds_id) == (41, 40, 3)
    device.set_sds(3, 50)
    assert (device.incarnation, device.durable_incarnation) == (50, 40)
    device.close()


WRONG_FIELDS = {
    "magic": (1, "magic is 0x1: not a device of pfvol"),
    "version": (2, "format version is 2, this program reads 1"),
    "size": (4096, "size field is 4096"),
    "cluster_id": (bytes(16), "cluster id is zero"),
    "device_id": (bytes(16), "device id is zero"),
    "sds_id": (65536, "SDS id 65536 is over 65535"),
    "device_index": (1 << 16, "device index 65536 is over 65535"),
    "slot_count": (0, "slot count 0 is not 1 to"),
    "incarnation": ((1 << 20) - 1, "leaves no other"),
    "durable_incarnation": (9, "durable incarnation 9 is over the incarnation 0"),
    "journal_generation": (0, "journal generation is zero"),
    "clean": (2, "clean flag is 2"),
    "unsure": (4, "unsure flags are 0x4"),
    "reserved": (b"\1" + bytes(23), "reserved fields are not zero"),
}


@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_each_wrong_field_of_the_superblock_has_its_message(path, field):
    value, message = WRONG_FIELDS[field]
    superblock_write(path, superblock_read(path) | {field: value})
    with pytest.raises(DeviceFormatError, match=message) as caught:
        BlockDevice.open(path)
    assert str(path / "superblock") in str(caught.value)


def test_a_superblock_that_has_rotted_is_replaced_by_the_one_before(path):
    """Goal: a flipped bit costs nothing but the knowledge of what is in the page cache; the good one is never at risk."""
    device = BlockDevice.open(path, boot_id=BOOT)
    device.recover()
    device.set_sds(3, 7)
    slot = device.alloc(1, 0)
    device.checkpoint()
    device.close(clean=False)
    whole, incarnation = (path / "superblock").read_bytes(), 7
    for bit in range(0, SUPERBLOCK.size * 8, 53):
        data = bytearray((path / "superblock").read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        (path / "superblock").write_bytes(data)
        device = BlockDevice.open(path, cluster_id=CLUSTER, boot_id=BOOT)
        assert (path / "superblock.new").read_bytes() != data  # it was written over, not the good one
        assert device.incarnation == device.durable_incarnation == (incarnation := incarnation + 1)
        summary = device.recover()
        assert (summary["superblock_restored"], summary["journal_damaged"], summary["unsure"]) == (True, False, False)
        assert [*device.used_slots()] == [(slot, 1, 0, 1)]
        device.set_sds(3, incarnation)
        device.close()
    (path / "superblock").write_bytes(whole[:-1] + b"\1")
    BlockDevice.open(path, boot_id=BOOT).close()
    for name in ("superblock", "superblock.new"):
        (path / name).write_bytes(b"\1" + whole[1:])
    with pytest.raises(DeviceFormatError, match="superblock: magic is"):
        BlockDevice.open(path)


@pytest.mark.parametrize("moved", [False, True])
def test_a_superblock_older_by_a_checkpoint_finds_the_journal(path, moved):
    device = BlockDevice.open(path, boot_id=BOOT)
    device.recover()
    kept = device.alloc(1, 0)
    given_back = device.alloc(1, 1)
    device.checkpoint()
    device.free_slot(given_back)
    device.checkpoint()
    assert device.alloc(2, 5) == given_back
    device.commit()
    if moved:  # the half that the older superblock names holds the next generation already
        device.checkpoint_begin()
        device.alloc(2, 6)
        device.commit()
    device.close(clean=False)
    (path / "superblock").write_bytes(b"rotten")
    device = BlockDevice.open(path, boot_id=BOOT)
    summary = device.recover()
    assert (summary["superblock_restored"], summary["journal_damaged"]) == (True, False)
    assert [chunk[:3] for chunk in device.used_slots()] == [(kept, 1, 0), (1, 2, 5), (2, 2, 6)][: 3 if moved else 2]
    assert device.dirty == [(2, 5, 1), (2, 6, 2)][: 2 if moved else 1]
    device.close()


def test_a_device_of_another_cluster(path):
    with pytest.raises(DeviceFormatError, match="belongs to another cluster"):
        BlockDevice.open(path, cluster_id=b"other cluster id")


@pytest.mark.parametrize("name", ["blocks", "slots", "tags", "journal"])
def test_a_missing_or_cut_file(path, name):
    size = (path / name).stat().st_size
    os.truncate(path / name, size - 1)
    with pytest.raises(DeviceFormatError, match=f"{name}: has {size - 1} bytes where {size} are due"):
        BlockDevice.open(path)
    (path / name).unlink()
    with pytest.raises(DeviceFormatError, match=f"{name}: the file is missing"):
        BlockDevice.open(path)
    (path / name).mkdir()
    with pytest.raises(DeviceFormatError, match=name):
        BlockDevice.open(path)


def test_a_directory_that_is_no_device(tmp_path, path):
    (path / "superblock").unlink()
    with pytest.raises(DeviceFormatError, match="there is no superblock"):
        BlockDevice.open(path)
    with pytest.raises(FileNotFoundError):
        BlockDevice.open(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(DeviceFormatError, match="not a directory"):
        BlockDevice.open(tmp_path / "file")


def test_a_refused_device_is_not_left_locked_nor_changed(path):
    superblock_write(path, superblock_read(path) | {"clean": 7})
    before = (path / "superblock").read_bytes()
    for _ in range(3):
        with pytest.raises(DeviceFormatError, match="clean flag"):
            BlockDevice.open(path)
    assert (path / "superblock").read_bytes() == before


def test_a_device_of_1_tib_opens_at_once_and_stays_sparse(tmp_path):
    path = tmp_path / "big"
    BlockDevice.create(path, cluster_id=CLUSTER, size_bytes=1 << 40)
    begin = time.process_time()
    device = BlockDevice.open(path)
    device.recover()
    assert time.process_time() - begin < 0.5
    assert device.free == 262144
    device.close()
    assert (path / "tags").stat().st_blocks == 0
    assert (path / "blocks").stat().st_blocks == 0


# -- slots and blocks


def test_a_new_slot_reads_as_never_written_zeros(device):
    slot = device.alloc(11, 5, 2)
    assert list(device.used_slots()) == [(slot, 11, 5, 2)]
    assert device.tag(slot, 1023) == (checksum.check_zero_block(11, 5, 1023), 0, tags.HOLE)
    assert device.read_block(slot, 0) == (bytes(4096), True)
    assert device.verify_slot(slot) == []


def test_blocks_verify_and_misdirected_or_flipped_ones_do_not(path, device):
    slot, other = device.alloc(1, 0), device.alloc(1, 1)
    data = random.Random(4).randbytes(4096)
    for block in (0, 511, 1023):
        device.write_block(slot, block, data, 1, block + 1)
    assert device.verify_slot(slot) == []
    with open(path / "blocks", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, slot * 4 * MIB + 4096)  # the right bytes in the wrong block
        os.pwrite(file.fileno(), data, other * 4 * MIB)  # the right bytes in the wrong chunk
        os.pwrite(file.fileno(), b"\0", slot * 4 * MIB + 511 * 4096 + 77)
    assert device.verify_slot(slot) == [1, 511]
    assert device.verify_slot(other) == [0]
    assert device.read_block(slot, 511)[1] is False
    assert device.read_block(slot, 1023) == (data, True)


def test_a_freed_slot_rests_until_the_checkpoint_and_comes_back_empty(path, device):
    slots = [device.alloc(1, chunk) for chunk in range(8)]
    with pytest.raises(OSError, match="No space") as caught:
        device.alloc(1, 8)
    assert caught.value.errno == errno.ENOSPC
    device.commit()
    for block in range(0, 1024, 8):
        device.write_block(slots[3], block, b"x" * 4096, 1, block + 1)
    device.free_slot(slots[3])
    assert (device.free, device.quarantined, device.used) == (0, 1, 7)
    with pytest.raises(OSError, match="No space"):
        device.alloc(1, 8)
    with pytest.raises(OSError, match="Invalid"):
        device.free_slot(slots[3])
    device.checkpoint()
    assert (device.free, device.quarantined) == (1, 0)
    assert (path / "blocks").stat().st_blocks == 0
    assert device.alloc(2, 0) == slots[3]
    assert device.verify_slot(slots[3]) == []


def test_what_is_freed_during_a_checkpoint_waits_for_the_next(device):
    first, second = device.alloc(1, 0), device.alloc(1, 1)
    device.free_slot(first)
    device.checkpoint_begin()
    with pytest.raises(OSError, match="busy"):
        device.checkpoint_begin()
    device.free_slot(second)
    device.sync()
    device.journal_void()
    device.checkpoint_end()
    assert (device.free, device.quarantined) == (7, 1)
    device.checkpoint()
    assert (device.free, device.quarantined) == (8, 0)


# -- syncs


def test_tags_given_out_since_the_last_sync_are_synced_with_their_places(path, device):
    """Only tags whose places in the file are durable may be written without the file's metadata."""
    told = subprocess.run(["stat", "-f", "-c", "%t", str(path)], capture_output=True, text=True, check=True)
    overwrites_in_place = told.stdout.strip() in ("ef53", "1021994")  # ext4, tmpfs
    assert device.tags_settled == overwrites_in_place, "recovery has synced them"
    slot = device.alloc(1, 0)
    assert not device.tags_settled
    device.commit()
    device.write_block(slot, 0, os.urandom(4096), 1, 1)
    assert not device.tags_settled, "neither the journal's commit nor a write brings them to the disk"
    device.sync()
    device.write_block(slot, 1, os.urandom(4096), 1, 2)
    device.checkpoint()
    assert device.tags_settled == overwrites_in_place, "another block of the same slot has its place"
    other = device.alloc(1, 1)
    device.free_slot(other)
    assert not device.tags_settled
    device.checkpoint()
    assert device.tags_settled == overwrites_in_place
    device.alloc(1, 1)
    assert not device.tags_settled, "a slot that is given out again is given out"


def test_tags_of_an_earlier_start_are_not_taken_for_synced(path):
    device = BlockDevice.open(path, cluster_id=CLUSTER, boot_id=BOOT)
    device.recover()
    device.alloc(1, 0)
    device.checkpoint()
    device.close(clean=False)
    device = BlockDevice.open(path, cluster_id=CLUSTER, boot_id=BOOT)
    assert not device.tags_settled
    device.close()


# -- journal


def test_records_are_durable_when_committed_and_counted_over_generations(device):
    slot = device.alloc(1, 0)
    count = device.intent(1, 0, slot)
    assert (count, device.journal_appended, device.journal_durable) == (2, 2, 0)
    device.commit()
    assert device.journal_durable == 2
    for generation in range(2, 9):
        assert device.checkpoint_begin() == generation
        assert device.intent(1, 0, slot) == generation + 1
        device.sync()
        device.journal_void()
        device.checkpoint_end()
        assert device.journal_durable == generation + 1


def test_a_full_half_asks_for_a_checkpoint(device):
    slot = device.alloc(1, 0)
    limit = 3 * 8 + 64
    for _ in range(limit - 1):
        device.intent(1, 0, slot)
    with pytest.raises(OSError, match="No space"):
        device.intent(1, 0, slot)
    with pytest.raises(OSError, match="temporarily unavailable"):
        device.alloc(1, 1)
    device.commit()
    device.checkpoint()
    assert device.intent(1, 0, slot) == limit + 1
    assert device.alloc(1, 1) == 1


def test_an_intent_outside_of_the_device_is_refused(device):
    with pytest.raises(OSError, match="Invalid"):
        device.intent(1, 0, 8)
    assert device.intent(1, 0, NO_SLOT) == 1
