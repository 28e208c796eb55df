"""What recovery finds and repairs, one damage at a time; and what a failing disk does."""

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import crcmod.predefined
import pytest

from datapath import checksum, tags
from datapath.blockfile import BlockDevice

CLUSTER = bytes(range(16))
BOOT = b"a boot of a host"
SLOT = 4 << 20
REPOSITORY = Path(__file__).parents[2]
crc32c = crcmod.predefined.mkCrcFun("crc-32c")


def create(path, slots=8):
    BlockDevice.create(path, cluster_id=CLUSTER, size_bytes=slots * SLOT)
    return reopen(path)[0]


def reopen(path):
    device = BlockDevice.open(path, boot_id=BOOT)
    return device, device.recover()


def crash(device, target):
    """The device as kill -9 leaves it: the page cache stays, what is in the process's memory goes."""
    shutil.copytree(device.path, target, copy_function=copy_sparse)
    return reopen(target)


def copy_sparse(source, target):
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


def patch(path, name, offset, data):
    with open(Path(path) / name, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, offset)


def entry(volume_id, chunk_index, state, epoch, generation, slot):
    packed = struct.pack("<QIIIII", volume_id, chunk_index, state, epoch, generation, slot)
    return packed + struct.pack("<I", crc32c(packed))


@pytest.fixture
def device(tmp_path):
    made = create(tmp_path / "dev0")
    yield made
    made.close(clean=False)


def test_after_a_clean_stop_with_a_checkpoint_nothing_is_dirty(device):
    slot = device.alloc(1, 0)
    device.commit()
    device.write_block(slot, 9, b"9" * 4096, 1, 1)
    device.checkpoint()
    device.close()
    again, summary = reopen(device.path)
    assert summary["clean"]
    assert (summary["dirty"], summary["records"]) == ([], 0)
    assert again.read_block(slot, 9) == (b"9" * 4096, True)
    again.close()


def test_a_clean_stop_forgets_no_intent(device):
    slot = device.alloc(1, 0)
    device.close()
    again, summary = reopen(device.path)
    assert summary["clean"]
    assert again.dirty == [(1, 0, slot)]
    again.close(clean=False)
    again, summary = reopen(device.path)
    assert not summary["clean"]
    assert again.dirty == [(1, 0, slot)]
    again.close()


def test_dirty_chunks_stay_dirty_over_any_number_of_crashes_until_a_checkpoint(device, tmp_path):
    old, new = device.alloc(1, 0), device.alloc(1, 1)
    device.checkpoint()
    device.intent(1, 1, new)
    device.commit()
    device.checkpoint_begin()
    device.intent(1, 0, old)
    device.commit()
    current = device
    for turn in range(5):
        crashed, summary = crash(current, tmp_path / f"crash{turn}")
        assert sorted(summary["dirty"]) == [(1, 0, old), (1, 1, new)]
        assert summary["generations"] == (2 if turn == 0 else 1)
        current.close(clean=False)
        current = crashed
    current.checkpoint()
    current.close(clean=False)
    again, summary = reopen(current.path)
    assert summary["dirty"] == []
    again.close()


def test_torn_blocks_become_unknown_and_the_rest_stays(device, tmp_path):
    slot = device.alloc(1, 0)
    device.commit()
    for block in range(4):
        device.write_block(slot, block, bytes([block]) * 4096, 1, block + 1)
    patch(device.path, "blocks", slot * SLOT + 2 * 4096 + 2048, b"old half" * 256)
    again, summary = crash(device, tmp_path / "crash")
    assert summary["unknown_blocks"] == 1
    assert again.tag(slot, 2)[1:] == (1, 3 | tags.UNKNOWN)
    assert again.verify_slot(slot) == []  # unknown, but true of its bytes
    assert again.read_block(slot, 1) == (b"\1" * 4096, True)
    again.close()


def test_blank_tags_of_a_new_slot_mean_never_written(device, tmp_path):
    slot = device.alloc(5, 6)
    device.commit()
    device.write_block(slot, 1, b"1" * 4096, 1, 1)
    patch(device.path, "tags", slot * 16384, bytes(16384))  # the tags did not reach the disk
    again, summary = crash(device, tmp_path / "crash")
    assert (summary["never_blocks"], summary["unknown_blocks"]) == (1023, 1)
    assert again.tag(slot, 0) == (checksum.check_zero_block(5, 6, 0), 0, tags.HOLE)
    assert again.tag(slot, 1)[2] & tags.UNKNOWN
    again.close()


def test_blank_tags_of_an_old_slot_are_unknown_even_over_zeros(device, tmp_path):
    slot = device.alloc(5, 6)
    device.checkpoint()
    device.intent(5, 6, slot)
    device.commit()
    patch(device.path, "tags", slot * 16384, bytes(4096))
    again, summary = crash(device, tmp_path / "crash")
    assert (summary["never_blocks"], summary["unknown_blocks"]) == (0, 256)
    again.close()


def test_a_damaged_entry_comes_back_from_the_journal_or_is_lost(device, tmp_path):
    old, new = device.alloc(1, 0, 4), device.alloc(1, 1, 5)
    device.checkpoint()
    device.intent(1, 1, new)
    device.commit()
    patch(device.path, "slots", new * 32 + 3, b"\xff")
    patch(device.path, "slots", old * 32, bytes(32))
    again, summary = crash(device, tmp_path / "crash")
    assert list(again.used_slots()) == [(new, 1, 1, 5)]
    assert (summary["mended"], summary["lost"], summary["unsure"]) == (1, [old], True)
    assert summary["lost_reasons"] == [f"slot {old}: its entry in the slot table is damaged"]
    assert (again.used, again.free) == (1, 6)
    for chunk in range(6):
        assert again.alloc(2, chunk) != old
    again.close()
    again, summary = reopen(again.path)
    assert (summary["lost"], summary["unsure"]) == ([old], True)
    again.sure()
    again.checkpoint()
    assert (again.unsure, again.free) == (False, 1)
    assert again.alloc(3, 3) == old
    assert again.tag(old, 0) == (checksum.check_zero_block(3, 3, 0), 0, tags.HOLE)
    again.close()
    again, summary = reopen(again.path)
    assert (summary["lost"], summary["unsure"]) == ([], False)
    again.close()


@pytest.mark.parametrize("at", range(0, 32, 3))
def test_one_bad_byte_of_an_entry_is_mended_if_the_tags_vouch_for_it(device, tmp_path, at):
    slots = [device.alloc(7, chunk, 4) for chunk in range(3)]
    device.commit()
    device.write_block(slots[1], 9, b"9" * 4096, 4, 1)
    device.checkpoint()
    was = (Path(device.path) / "slots").read_bytes()
    patch(device.path, "slots", 32 + at, bytes([was[32 + at] ^ 0x5A]))
    patch(device.path, "slots", 64 + at, bytes([was[64 + at] ^ 0x01]))
    patch(device.path, "tags", 2 * 16384, b"\xee" * 16384)  # of this one nothing vouches
    again, summary = crash(device, tmp_path / "crash")
    assert (summary["mended"], summary["lost"], again.dirty) == (1, [2], [(7, 1, 1)])
    assert list(again.used_slots()) == [(slot, 7, slot, 4) for slot in slots[:2]]
    assert again.read_block(slots[1], 9) == (b"9" * 4096, True)
    assert (Path(again.path) / "slots").read_bytes()[:64] == was[:64]
    again.close()


def test_what_rots_in_the_slot_tables_file_changes_nothing_and_is_written_anew(device):
    slots = [device.alloc(1, chunk, 3) for chunk in range(4)]
    device.checkpoint()
    was = (Path(device.path) / "slots").read_bytes()
    rng = random.Random(11)
    for _ in range(40):
        patch(device.path, "slots", rng.randrange(8 * 32), rng.randbytes(1))
    assert list(device.used_slots()) == [(slot, 1, slot, 3) for slot in slots]
    assert device.entries_repaired == 0
    device.checkpoint()
    assert 6 <= device.entries_repaired <= 8
    assert (Path(device.path) / "slots").read_bytes() == was
    device.free_slot(slots[0])
    device.close()
    again, summary = reopen(device.path)
    assert (again.used, summary["mended"], summary["lost"]) == (3, 0, [])
    again.close()


def test_an_entry_in_the_wrong_place_is_lost_if_there_is_something_in_the_slot(device, tmp_path):
    device.alloc(1, 0)
    device.alloc(1, 1)
    device.checkpoint()
    for slot in (1, 5):
        patch(device.path, "slots", slot * 32, (Path(device.path) / "slots").read_bytes()[:32])
    again, summary = crash(device, tmp_path / "crash")
    assert (summary["lost"], summary["mended"], again.free) == ([1], 1, 6)
    again.close()


def test_a_chunk_in_two_slots_keeps_the_one_that_the_journal_knows_or_none(device, tmp_path):
    device.alloc(1, 0)
    device.alloc(1, 1)
    device.checkpoint()
    patch(device.path, "slots", 3 * 32, entry(1, 0, 1, 1, 2, 3))  # given out now, its record never became durable
    patch(device.path, "slots", 4 * 32, entry(1, 1, 1, 1, 1, 4))  # of an old generation: no crash leaves that
    again, summary = crash(device, tmp_path / "crash")
    assert [slot for slot, *_ in again.used_slots()] == [0]
    assert (summary["lost"], summary["unsure"]) == ([1, 4], True)
    assert summary["lost_reasons"] == ["slot 1: the chunk is in slot 4 too", "slot 4: the chunk is in slot 1 too"]
    assert again.free == 5
    again.close()


def test_a_freed_slot_is_punched_and_its_chunk_named(device, tmp_path):
    slot = device.alloc(1, 0)
    device.commit()
    device.write_block(slot, 7, b"7" * 4096, 1, 1)
    device.checkpoint()
    device.free_slot(slot)
    device.commit()
    again, summary = crash(device, tmp_path / "crash")
    assert (again.freed, again.dirty, summary["punched"], again.free) == ([(1, 0)], [], 1, 8)
    assert again.alloc(9, 9) == slot
    assert again.verify_slot(slot) == []
    again.close()


def test_starts_that_are_killed_do_not_fill_the_journal_with_what_was_freed(device, tmp_path):
    device.alloc(1, 0)
    device.checkpoint()
    device.free_slot(device.alloc(1, 1))
    device.commit()
    for start in range(3):
        device, summary = crash(device, tmp_path / f"crash{start}")
        assert summary["freed"] == [(1, 1)]
        assert (start, summary["carried"], summary["records"]) == (start, 0, 2)
    device.close(clean=False)


def test_a_free_whose_record_was_lost_is_taken_back(device, tmp_path):
    slot = device.alloc(1, 0)
    device.commit()
    device.write_block(slot, 7, b"7" * 4096, 1, 1)
    device.checkpoint()
    device.intent(1, 0, slot)
    device.commit()
    device.free_slot(slot)  # in the slot table, not in the journal on disk
    again, summary = crash(device, tmp_path / "crash")
    assert list(again.used_slots()) == [(slot, 1, 0, 1)]
    assert summary["freed"] == []
    assert again.read_block(slot, 7) == (b"7" * 4096, True)
    again.close()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("at", [0, 2])
def test_a_record_that_has_rotted_is_no_end_of_the_journal(device, tmp_path, at, zeros):
    """Goal: what was durable behind it is not forgotten: everything is dirty, and what is in no slot may be lost."""
    slots = [device.alloc(1, chunk) for chunk in range(8)]
    device.checkpoint()
    for slot in slots[:4]:
        device.intent(1, slot, slot)
        device.commit()
    half = (Path(device.path) / "journal").stat().st_size // 2
    patch(device.path, "journal", 4096 + at * 64 + 32 * (not zeros), bytes(64) if zeros else b"\xee")
    again, summary = crash(device, tmp_path / "crash")
    assert (summary["records"], summary["journal_damaged"], summary["unsure"]) == (at, True, True)
    assert again.dirty == [(1, slot, slot) for slot in slots]
    patch(again.path, "journal", half + 5, b"\xaa")
    last, summary = crash(again, tmp_path / "last")  # each chunk has its intent again
    assert (summary["journal_damaged"], summary["unsure"]) == (True, True)
    assert last.dirty == again.dirty
    again.close()
    last.close()


def test_a_batch_that_was_torn_is_an_end_of_the_journal(device, tmp_path):
    for slot in [device.alloc(1, chunk) for chunk in range(8)]:
        device.intent(1, slot, slot)
    for chunk in range(30):
        device.intent(2, chunk, 0xFFFFFFFF)
    device.commit()
    half = (Path(device.path) / "journal").stat().st_size // 2
    patch(device.path, "journal", half + 4096 + 512, bytes(512))  # one sector of the first commit did not get there
    again, summary = crash(device, tmp_path / "crash")
    assert (summary["records"], summary["journal_damaged"], summary["unsure"]) == (8, False, False)
    again.close()


def test_a_chunk_whose_record_and_entry_are_gone_is_known_to_be_missing(device, tmp_path):
    """As after a loss of power: the slot table on the disk is older than the journal, and that has rotted."""
    device.checkpoint()
    before = (Path(device.path) / "slots").read_bytes()
    slot = device.alloc(1, 0)
    device.commit()
    device.write_block(slot, 3, b"3" * 4096, 1, 1)
    device.commit()
    (Path(device.path) / "slots").write_bytes(before)
    patch(device.path, "journal", 4096 + 20, b"\xee")
    again, summary = crash(device, tmp_path / "crash")
    assert (summary["lost"], summary["unsure"], list(again.used_slots())) == ([slot], True, [])
    assert summary["lost_reasons"] == [f"slot {slot}: it is free and yet there is something in it"]
    again.close()


def test_what_an_older_process_left_behind_the_end_is_not_believed(device, tmp_path):
    for chunk in range(3):
        device.alloc(1, chunk)
    device.commit()
    half = (Path(device.path) / "journal").stat().st_size // 2
    records = half + 4096
    stale = (Path(device.path) / "journal").read_bytes()[records + 128 : records + 192]
    patch(device.path, "journal", records + 64, bytes(64))  # a torn batch: record 2 without record 1
    again, summary = crash(device, tmp_path / "crash")
    assert summary["records"] == 1
    again.intent(1, 0, 0)
    again.commit()
    patch(again.path, "journal", records + 128, stale)
    last, summary = crash(again, tmp_path / "last")
    assert summary["records"] == 2
    again.close()
    last.close()


@pytest.mark.parametrize("other", [False, True])
def test_a_journal_header_that_has_rotted_makes_everything_dirty_until_a_checkpoint(device, tmp_path, other):
    slots = [device.alloc(1, chunk) for chunk in range(3)]
    device.checkpoint()
    device.alloc(1, 3)
    device.commit()
    half = (Path(device.path) / "journal").stat().st_size // 2
    patch(device.path, "journal", other * half + 5, b"\xaa")
    again, summary = crash(device, tmp_path / "crash")
    assert (summary["journal_damaged"], summary["unsure"], summary["records"]) == (True, True, 1)
    assert again.dirty == [(1, slot, slot) for slot in (*slots, 3)]
    again.checkpoint()
    again.sure()
    again.checkpoint()
    again.close()
    again, summary = reopen(again.path)
    assert (summary["journal_damaged"], summary["unsure"], again.dirty) == (False, False, [])
    again.close()


def test_a_generation_whose_header_has_rotted_is_read_all_the_same(device, tmp_path):
    device.checkpoint()
    device.checkpoint_begin()
    slot = device.alloc(1, 0)
    device.commit()
    patch(device.path, "journal", (Path(device.path) / "journal").stat().st_size // 2 + 5, b"\xaa")
    patch(device.path, "slots", slot * 32, bytes(32))
    again, summary = crash(device, tmp_path / "crash")
    assert (summary["journal_damaged"], summary["generations"], summary["records"]) == (True, 2, 1)
    assert [*again.used_slots()] == [(slot, 1, 0, 1)]
    again.close()


# -- power loss: of every page either what was synced or what was written after is on the disk


class Model:
    """Random work on a device, what it wrote, and what a sync has promised."""

    def __init__(self, path, rng):
        self.rng, self.path = rng, path
        self.device = create(path, slots=4)
        self.slots, self.blocks, self.seq = {}, {}, 0
        self.journal = self.table = None
        self.written = {}
        self.unrecorded = set()
        self.after_sync()

    def after_sync(self):
        self.after_commit()
        self.table = {name: (Path(self.path) / name).read_bytes() for name in ("blocks", "slots", "tags")}

    def after_commit(self):
        self.journal = (Path(self.path) / "journal").read_bytes()
        self.unrecorded.clear()

    def step(self):
        action = self.rng.choice(["write"] * 6 + ["alloc"] * 3 + ["free", "commit", "checkpoint", "half checkpoint"])
        chunk = (self.rng.randrange(1, 3), self.rng.randrange(3))
        if action == "alloc" and chunk not in self.slots and self.device.free:
            self.slots[chunk] = self.device.alloc(*chunk, 1)
            self.unrecorded.add(chunk)
            self.blocks[chunk] = {}
        elif action == "write" and chunk in self.slots:
            self.write(chunk)
        elif action == "free" and chunk in self.slots:
            self.device.free_slot(self.slots.pop(chunk))
            self.blocks.pop(chunk)
            self.unrecorded.add(chunk)
        elif action == "commit":
            self.device.commit()
            self.after_commit()
        elif action == "checkpoint":
            self.device.checkpoint()
            self.after_sync()
        elif action == "half checkpoint":
            self.device.checkpoint_begin()
            self.device.sync()
            self.after_sync()
            self.device.journal_void()
            self.device.checkpoint_end()
            self.after_commit()

    def write(self, chunk):
        self.device.intent(*chunk, self.slots[chunk])
        self.device.commit()
        self.after_commit()
        for _ in range(3):
            self.seq += 1
            block, data = self.rng.randrange(6), self.rng.randbytes(4096)
            self.device.write_block(self.slots[chunk], block, data, 1, self.seq)
            self.blocks[chunk][block] = data
            self.written[(*chunk, block, self.seq)] = data

    def lose_power(self, target):
        target.mkdir()
        shutil.copy(Path(self.path) / "superblock", target)
        for name, synced in {"journal": self.journal, **self.table}.items():
            now = (Path(self.path) / name).read_bytes()
            mixed = bytearray(len(now))
            unit = 512 if name == "journal" else 4096
            for at in range(0, len(now), unit):
                mixed[at : at + unit] = (now if self.rng.random() < 0.5 else synced)[at : at + unit]
            (target / name).write_bytes(mixed)


@pytest.mark.parametrize("seed", range(24))
def test_power_loss_at_any_moment(tmp_path, seed):
    rng = random.Random(seed)
    model = Model(tmp_path / "dev", rng)
    for _ in range(rng.randrange(4, 30)):
        model.step()
    model.lose_power(tmp_path / "lost")
    device, summary = reopen(tmp_path / "lost")
    assert summary["lost"] == []
    found = {(volume, chunk): slot for slot, volume, chunk, _ in device.used_slots()}
    suspect = {(volume, chunk) for volume, chunk, _ in device.dirty} | set(device.freed) | model.unrecorded
    assert set(found) ^ set(model.slots) <= suspect, "a chunk came or went and is not reported"
    for chunk, slot in found.items():
        assert device.verify_slot(slot) == []
        for block in range(8):
            _, _, seq = device.tag(slot, block)
            data, _ = device.read_block(slot, block)
            if chunk not in suspect:
                assert data == model.blocks[chunk].get(block, bytes(4096)), "a clean chunk lost a write"
            if not seq & (tags.UNKNOWN | tags.HOLE):
                assert data == model.written[(*chunk, block, seq)], "a tag names a write whose bytes are not there"
    second, _ = crash(device, tmp_path / "second")
    assert set(device.dirty) <= set(second.dirty)
    assert set(device.freed) <= set(second.freed)
    for each in (model.device, device, second):
        each.close(clean=False)


# -- disks that fail


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB of its own, where mounting is allowed."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mounted], capture_output=True, check=False)
    yield mounted if done.returncode == 0 else None
    if done.returncode == 0:
        subprocess.run(["umount", "-l", mounted], check=True)


def test_a_slot_whose_tags_find_no_room_is_refused_and_nothing_else(small_disk):
    if small_disk is None:
        return
    device = create(small_disk / "dev", slots=130)
    for chunk in range(64):
        device.alloc(1, chunk)
    with pytest.raises(OSError, match="No space") as caught:
        device.alloc(1, 64)
    assert caught.value.errno == errno.ENOSPC
    assert (device.failed, device.used, device.journal_appended) == (0, 64, 64)
    device.checkpoint()
    device.close(clean=False)


def test_the_first_failed_write_takes_the_device_out_of_service(tmp_path):
    path = tmp_path / "dev"
    device = create(path)
    slot = device.alloc(1, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            device.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert device.failed == errno.EFBIG
    assert device.journal_durable == 0
    for call in (device.commit, device.sync, device.journal_void, device.checkpoint_begin, lambda: device.alloc(1, 1)):
        with pytest.raises(OSError, match="too large"):
            call()
    with pytest.raises(OSError, match="too large"):
        device.free_slot(slot)
    device.close(clean=False)


class FullError(Exception):
    pass


def until_full(write):
    """Calls ``write(0)``, ``write(1)``… up to the first ENOSPC; returns how many worked."""
    count = 0
    with contextlib.suppress(FullError):
        while True:
            try:
                write(count)
            except OSError as error:
                raise (FullError if error.errno == errno.ENOSPC else error) from None
            count += 1
    return count


def test_enospc_loses_nothing_that_was_there(small_disk):
    if small_disk is None:
        return
    device = create(small_disk / "dev", slots=4)
    slot = device.alloc(1, 0)
    device.commit()
    written = until_full(lambda block: device.write_block(slot, block, bytes([block % 251 + 1]) * 4096, 1, block + 1))
    assert 100 < written < 1024
    with pytest.raises(OSError, match="No space"):
        BlockDevice.create(small_disk / "more", cluster_id=CLUSTER, size_bytes=1 << 40)
    assert not (small_disk / "more").exists()
    device.intent(1, 0, slot)
    device.checkpoint()
    fill = os.open(small_disk / "fill", os.O_CREAT | os.O_WRONLY)
    until_full(lambda _: os.write(fill, bytes(4096)))
    os.close(fill)
    device.checkpoint()
    assert device.failed == 0
    device.close(clean=False)
    device, _ = reopen(small_disk / "dev")
    for block in range(written):
        assert device.read_block(slot, block) == (bytes([block % 251 + 1]) * 4096, True)
    device.close(clean=False)


def test_a_short_fuzz_of_the_device_files():
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tools/fuzz/fuzz_device.py", "--seconds", "2"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
