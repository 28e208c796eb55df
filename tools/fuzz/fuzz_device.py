"""Damages a device's files at random, opens, recovers and reads it: no crash, and never bytes that were not written.

A round copies one small device with a live journal and
damages one of its files: bits, runs of noise or zeros, exchanged pages, another length, no file at all. Then each
block must either hold what was written under its tag, or be reported: unreadable device, lost slot, unknown block,
failed verification.
"""

import argparse
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

from datapath.blockfile import FILES, BlockDevice, DeviceFormatError
from datapath.tags import HOLE, UNKNOWN

SLOTS = 6
BLOCK = 4096
CLUSTER = bytes(range(16))
Contents = dict[tuple[int, int], dict[int, bytes]]


def build(path: Path, rng: random.Random) -> Contents:
    """A device as kill -9 leaves it: old chunks, new chunks, a freed one, intents in both generations."""
    BlockDevice.create(path / "origin", cluster_id=CLUSTER, size_bytes=SLOTS << 22)
    device = BlockDevice.open(path / "origin")
    device.recover()
    contents: Contents = {}
    slots: dict[tuple[int, int], int] = {}

    def write(chunk: tuple[int, int], epoch: int) -> None:
        if chunk not in slots:
            slots[chunk] = device.alloc(*chunk, epoch)
            contents[chunk] = {}
        device.intent(*chunk, slots[chunk])
        device.commit()
        for block in rng.sample(range(1024), 12):
            data = rng.randbytes(BLOCK)
            device.write_block(slots[chunk], block, data, epoch, len(contents[chunk]) + 1)
            contents[chunk][block] = data

    write((1, 0), 1)
    write((1, 1), 1)
    write((2, 0), 1)
    device.checkpoint()
    write((1, 1), 2)
    device.free_slot(slots.pop((2, 0)))
    del contents[(2, 0)]
    device.commit()
    device.checkpoint_begin()
    write((3, 7), 3)
    shutil.copytree(path / "origin", path / "template", copy_function=copy_sparse)
    device.close(clean=False)
    return contents


def copy_sparse(source: str, target: str) -> None:
    """Copies what is allocated: most of a block file is a hole."""
    with open(source, "rb") as read, open(target, "wb") as write:
        size = os.fstat(read.fileno()).st_size
        os.ftruncate(write.fileno(), size)
        end = 0
        while True:
            try:
                begin = os.lseek(read.fileno(), end, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(read.fileno(), begin, os.SEEK_HOLE)
            os.pwrite(write.fileno(), os.pread(read.fileno(), end - begin, begin), begin)


def damage(path: Path, rng: random.Random) -> str:
    """Damages one file of the device; returns what it did."""
    name = rng.choice([*FILES, "superblock"])
    file = path / name
    size = file.stat().st_size
    kind = rng.choice(["bits", "noise", "zeros", "swap", "truncate", "extend", "remove"])
    if kind == "remove":
        file.unlink()
    elif kind in ("truncate", "extend"):
        os.truncate(file, rng.randrange(size) if kind == "truncate" else size + rng.randrange(1, 8192))
    else:
        with open(file, "r+b", buffering=0) as opened:
            _scribble(opened.fileno(), size, kind, rng)
    return f"{kind} {name}"


def _scribble(fd: int, size: int, kind: str, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 1, 20])):
        length = min(size, rng.choice([1, 4, 32, 64, 512, 4096]))
        # Most of a large file is empty: half of the damage goes to its beginning, where something is.
        at = rng.randrange(rng.choice([size, min(size, 65536)]) - length + 1) // length * length
        data = os.pread(fd, length, at)
        if kind == "bits":
            data = bytes([data[0] ^ (1 << rng.randrange(8))]) + data[1:]
        elif kind == "noise":
            data = rng.randbytes(length)
        elif kind == "zeros":
            data = bytes(length)
        else:
            other = rng.randrange(size - length + 1) // length * length
            os.pwrite(fd, data, other)
            data = os.pread(fd, length, other)
        os.pwrite(fd, data, at)


def check(path: Path, contents: Contents) -> str:
    """Opens and reads the device; raises AssertionError for a wrong byte that nothing reports."""
    try:
        device = BlockDevice.open(path, cluster_id=CLUSTER)
    except (DeviceFormatError, OSError):
        return "refused"
    try:
        device.recover()
        found = {(volume, chunk): slot for slot, volume, chunk, _ in device.used_slots()}
        assert set(found) <= set(contents), f"chunks from nowhere: {set(found) - set(contents)}"
        assert set(found) == set(contents) or device.unsure, "a chunk vanished and the device is sure of itself"
        for chunk, slot in found.items():
            bad = set(device.verify_slot(slot))
            for block, written in contents[chunk].items():
                _, _, seq = device.tag(slot, block)
                if block in bad or seq & UNKNOWN:
                    continue
                data, good = device.read_block(slot, block)
                assert good, f"block {block} of {chunk} verifies in one way and not in the other"
                assert not seq & HOLE, f"block {block} of {chunk} became a hole"
                assert data == written, f"block {block} of {chunk} has other bytes, and its tag agrees"
    finally:
        device.close(clean=False)
    return "recovered"


def run(seconds: float, seed: int) -> dict[str, int]:
    """Rounds until the time is over; how many ended how."""
    rng = random.Random(seed)
    ends: dict[str, int] = {}
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as directory:
        contents = build(Path(directory), rng)
        victim = Path(directory) / "victim"
        while time.monotonic() < deadline:
            shutil.rmtree(victim, ignore_errors=True)
            shutil.copytree(Path(directory) / "template", victim, copy_function=copy_sparse)
            done = damage(victim, rng)
            try:
                end = check(victim, contents)
            except Exception as error:
                raise AssertionError(f"after {done}, round {sum(ends.values())}, seed {seed}: {error}") from error
            ends[end] = ends.get(end, 0) + 1
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    ends = run(arguments.seconds, arguments.seed)
    rounds = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    print(f"seed {arguments.seed}: {sum(ends.values())} rounds ({rounds})")


if __name__ == "__main__":
    main()
