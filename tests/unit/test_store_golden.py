"""The disk formats, byte for byte: as packed here from the documented fields, and as kept in tests/golden/disk.json."""

import json
import struct
from pathlib import Path

import crcmod.predefined
import pytest

from datapath import tags
from datapath.blockfile import BlockDevice

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "disk.json").read_text())
CLUSTER = bytes(range(16))
DEVICE = bytes(range(16, 32))
BOOT = b"a boot of a host"
crc32c = crcmod.predefined.mkCrcFun("crc-32c")


def sealed(packed):
    return packed + struct.pack("<I", crc32c(packed))


def with_device_id(path):
    """A device whose one random field is fixed."""
    data = bytearray((path / "superblock").read_bytes())
    data[32:48] = DEVICE
    data[:140] = sealed(data[:136])
    (path / "superblock").write_bytes(data)
    half = (path / "journal").stat().st_size // 2
    with open(path / "journal", "r+b") as file:
        file.seek(half)
        file.write(journal_header(1))


def journal_header(generation):
    packed = struct.pack("<QIIQ16s", 0x314C4E4A55465650, 1, 0, generation, DEVICE)
    return packed[:12] + struct.pack("<I", crc32c(packed)) + packed[16:]


@pytest.fixture
def device(tmp_path):
    path = tmp_path / "dev"
    BlockDevice.create(path, cluster_id=CLUSTER, sds_id=3, index=2, size_bytes=3 * 4194304)
    with_device_id(path)
    opened = BlockDevice.open(path, boot_id=BOOT)
    opened.recover()
    yield opened
    opened.close(clean=False)


def contents(device, name, offset, size):
    with open(Path(device.path) / name, "rb") as file:
        file.seek(offset)
        return file.read(size)


def golden(name, data):
    """Compares with the kept copy: a difference is a change of the format, that is, a new DISK_VERSION."""
    assert data.hex() == GOLDEN[name]


def test_superblock(device):
    head = struct.pack("<QII16s16sII", 0x3142535655465650, 1, 140, CLUSTER, DEVICE, 3, 2)
    numbers = struct.pack("<QQQQ16sI28s", 3, 1, 1, 1, BOOT, 0, bytes(28))
    found = contents(device, "superblock", 0, 4096)
    assert found == sealed(head + numbers).ljust(4096, b"\0")
    assert found.startswith(b"PVFUVSB1")
    golden("superblock", found[:140])


def test_slot_entries(device):
    slot = device.alloc(0x1122334455667788, 0x99AABBCC, 7)
    found = contents(device, "slots", slot * 32, 32)
    assert found == sealed(struct.pack("<QIIIII", 0x1122334455667788, 0x99AABBCC, 1, 7, 1, slot))
    golden("slot entry in use", found)
    device.free_slot(slot)
    found = contents(device, "slots", slot * 32, 32)
    assert found == sealed(struct.pack("<QIIIII", 0x1122334455667788, 0x99AABBCC, 0, 7, 1, slot))
    golden("slot entry freed", found)
    found = contents(device, "slots", 2 * 32, 32)
    assert found == sealed(struct.pack("<QIIIII", 0, 0, 0, 0, 0, 2))
    golden("slot entry never used", found)


def test_tags(device):
    slot = device.alloc(5, 6)
    data = bytes(range(256)) * 16
    device.write_block(slot, 3, data, 8, (2 << 42) | 9)
    name = struct.pack("<IQ", 8, (2 << 42) | 9)
    check = crc32c(struct.pack("<QII", 5, 6, 3) + data)
    found = contents(device, "tags", slot * 16384 + 3 * 16, 16)
    assert found == struct.pack("<I", check ^ crc32c(name)) + name
    assert found == tags.pack(check, 8, (2 << 42) | 9)
    golden("tag", found)
    name = struct.pack("<IQ", 0, 1 << 63)
    check = crc32c(struct.pack("<QII", 5, 6, 4) + bytes(4096))
    found = contents(device, "tags", slot * 16384 + 4 * 16, 16)
    assert found == struct.pack("<I", check ^ crc32c(name)) + name == tags.never(5, 6, 4)
    golden("tag never written", found)


def test_journal(device):
    slot = device.alloc(5, 6, 7)
    device.intent(5, 6, slot)
    device.free_slot(slot)
    device.commit()
    half = 4096 + (3 * 6 + 64 + 63) // 64 * 4096
    assert (Path(device.path) / "journal").stat().st_size == 2 * half
    found = contents(device, "journal", half, 4096)
    assert found == journal_header(1).ljust(4096, b"\0")
    assert found.startswith(b"PVFUJNL1")
    golden("journal header", found[:40])
    records = b""
    for index, kind in enumerate([2, 1, 3]):
        body = struct.pack("<IQQQIIII16s", kind, 1, index, 5, 6, slot, 7, 1, bytes(16))
        records += struct.pack("<I", crc32c(body)) + body
    found = contents(device, "journal", half + 4096, 4096)
    assert found == records.ljust(4096, b"\0")
    golden("journal records", records)
    device.checkpoint_begin()
    device.commit()
    assert contents(device, "journal", 0, 40) == journal_header(2)
