"""Goes through a recording and judges what a loss of power after each operation can leave.

``Bench`` makes the files of one state and lets the product's own code recover them. ``Explorer`` takes the operations
one by one, and after each that changes a file or a claim tries the two ends (nothing of what is not durable, all of it)
and some of what is between. Now and then a recovery is recorded in its turn, with some work after it, and searched the
same way.
"""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from datapath.blockfile import BlockDevice
from tests.crashstates.devicework import DeviceWork
from tests.crashstates.disk import PAGE, ZEROS, Disk, Pages
from tests.crashstates.oracle import Names, Oracle, Recovered
from tests.crashstates.pairs import problems_of_a_cut
from tests.crashstates.recording import MARK, SYNC_BEGIN, Operation, Recording

FilesByPath = dict[str, tuple[Pages, int]]
VERIFIED_WHOLE: Final = 0.05  # of the states: every block of every slot
FRESH_VOLUME: Final = 77
AGAIN: Final = 0.05  # of the states: recovered a second time
FINDINGS_SHOWN: Final = 10


def _write(path: Path, pages: Pages, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(descriptor, size)
        first: int | None = None
        run: list[bytes] = []
        for page in [*sorted(one for one in pages if pages[one] is not ZEROS and one * PAGE < size), -1]:
            if first is not None and page != first + len(run):
                os.pwrite(descriptor, b"".join(run)[: size - first * PAGE], first * PAGE)
                first, run = None, []
            if page >= 0:
                first = page if first is None else first
                run.append(pages[page])
    finally:
        os.close(descriptor)


def _read(path: Path) -> Pages:
    pages: Pages = {}
    descriptor = os.open(path, os.O_RDONLY)
    try:
        at, size = 0, os.fstat(descriptor).st_size
        while at < size:
            try:
                at = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(descriptor, at, os.SEEK_HOLE)
            data = os.pread(descriptor, end - at, at)
            for offset in range(0, len(data), PAGE):
                content = data[offset : offset + PAGE]
                if content.count(0) != len(content):
                    pages[(at + offset) // PAGE] = content.ljust(PAGE, b"\0")
            at = end
    finally:
        os.close(descriptor)
    return pages


def taken_for_rot(summary: dict[str, Any]) -> list[str]:
    """What no crash leaves behind must not be found after one."""
    return [f"a crash taken for rot: {sign}" for sign in ("journal_damaged", "superblock_restored", "mended") if summary[sign]]


class Bench:
    """A directory in which states are made and recovered."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._paths: set[str] = set()

    def make(self, state: FilesByPath) -> None:
        if self._paths != state.keys():
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            self._paths = set(state)
        for path, (pages, size) in state.items():
            _write(self.directory / path, pages, size)

    def inodes(self) -> dict[str, int]:
        return {str(path.relative_to(self.directory)): path.stat().st_ino for path in self.directory.rglob("*")}

    @staticmethod
    def devices(state: FilesByPath) -> list[str]:
        """Directories with a device's name, whole or not."""
        return sorted({found[0] for path in state if (found := re.match(r".*/dev\d+(?=/)", path))})

    def recover(self, devices: list[str], boot: bytes, *, whole: bool = False) -> dict[str, Recovered]:
        """Raises what the product raises."""
        return {device: self._recover(device, boot, whole) for device in devices}

    def _recover(self, device: str, boot: bytes, whole: bool) -> Recovered:
        opened = BlockDevice.open(self.directory / device, boot_id=boot)
        try:
            summary = opened.recover()
            return self.look(device, opened, summary["lost_reasons"] + taken_for_rot(summary), whole)
        finally:
            opened.close(clean=False)

    def look(self, device: str, opened: BlockDevice, lost: list[str], whole: bool) -> Recovered:
        used = {slot: (volume, chunk) for slot, volume, chunk, _ in opened.used_slots()}
        if whole:
            lost = lost + [
                f"block {bad} of slot {slot} does not verify" for slot in used for bad in opened.verify_slot(slot)
            ]
        return Recovered(
            used=used,
            dirty={one[:2] for one in opened.dirty},
            freed=set(opened.freed),
            lost=lost,
            blocks=_read(self.directory / device / "blocks"),
            tags=_read(self.directory / device / "tags"),
            incarnation=opened.incarnation,
            durable_incarnation=opened.durable_incarnation,
        )


@dataclass
class Findings:
    """What was found, and how much was looked at."""

    states: int = 0
    operations: int = 0
    recoveries: int = 0  # that were recorded in their turn
    cuts: int = 0  # of one SDS of a pair
    problems: list[str] = field(default_factory=list)

    def take(self, other: Findings) -> None:
        self.states += other.states
        self.operations += other.operations
        self.recoveries += other.recoveries
        self.cuts += other.cuts
        self.problems += other.problems

    def add(self, where: str, problems: list[str]) -> None:
        self.problems += [f"{where}: {problem}" for problem in problems]


@dataclass
class Explorer:
    """``spread``: how many states between the two ends are tried after an operation; ``share``: after how many
    operations any. ``nested``: how many of the states have their recovery recorded and searched too. ``cuts``: after
    how many operations a pair with one SDS cut is made to agree. ``in_place``: see disk.py."""

    bench: Bench
    rng: random.Random
    spread: float
    nested: float
    cuts: float = 0.0
    in_place: bool = True
    share: float = 1.0
    depth: int = 0
    findings: Findings = field(default_factory=Findings)
    limit: int = FINDINGS_SHOWN  # of findings, after which it ends
    _seen: set[int] = field(default_factory=set)

    def run(self, name: str, operations: list[Operation], disk: Disk, oracles: list[Oracle]) -> Findings:
        recorded = [[oracle, -1] for oracle in oracles]
        paths: dict[int, str] = {}
        for position, operation in enumerate(operations):
            where = f"{name}, operation {position}"
            if operation.kind != MARK:
                disk.apply(operation)
                if operation.file not in paths or operation.kind < SYNC_BEGIN:
                    paths = {inode: self._path_of(disk, number) for inode, number in disk.inodes.items()}
            path = paths.get(operation.file, "") if operation.file else ""
            self.findings.operations += 1
            for state in recorded:
                oracle = state[0]
                assert isinstance(oracle, Oracle)
                try:
                    oracle.apply(operation, disk, path)
                except AssertionError as error:
                    self.findings.add(where, [str(error)])
                    return self.findings
                concerned = path.startswith(oracle.root) or oracle.claims != state[1]
                state[1] = oracle.claims
                if concerned and (self.share == 1.0 or self.rng.random() < self.share):
                    self._around(where, disk, oracle)
                if len(self.findings.problems) >= self.limit:
                    return self.findings
            if len(oracles) == 2 and all(oracle.opened for oracle in oracles) and self.rng.random() < self.cuts:
                self._cut(where, disk, oracles)
        return self.findings

    @staticmethod
    def _path_of(disk: Disk, number: int) -> str:
        return next((path for path, one in disk.paths.items() if one == number), "")

    def _around(self, where: str, disk: Disk, oracle: Oracle) -> None:
        modes: list[str | None] = ["none", "all"]
        between = int(self.spread) + (self.rng.random() < self.spread % 1)
        modes += [None if self.rng.random() < 0.8 else "sectors" for _ in range(between)]
        for mode in modes if disk.undecided else modes[:1]:
            state = disk.state(self.rng, mode, oracle.root)
            key = hash(
                (oracle.root, oracle.claims, *((path, frozenset(state[path][0].items())) for path in sorted(state)))
            )
            if key in self._seen:
                continue
            self._seen.add(key)
            self._judge(f"{where}, {mode or 'mixed'}", state, disk, oracle)

    def _judge(self, where: str, state: FilesByPath, disk: Disk, oracle: Oracle) -> None:
        self.findings.states += 1
        devices = self.bench.devices(state)
        if missing := oracle.opened - set(devices):
            self.findings.add(where, [f"the devices {missing} are gone"])
            return
        self.bench.make(state)
        try:
            whole = self.rng.random() < VERIFIED_WHOLE
            recovered = self.bench.recover(devices, self.rng.randbytes(16), whole=whole)
            if not oracle.opened:
                return  # not in use yet: what matters is that what is there can be used
            problems = oracle.problems(recovered, disk)
            if self.rng.random() < AGAIN:
                problems += self._again(devices, recovered)
        except (OSError, ValueError, AssertionError) as error:
            problems = [f"cannot be recovered: {error!r} at {traceback.extract_tb(error.__traceback__)[-1]}"]
        self.findings.add(where, problems)
        if not problems and self.rng.random() < self.nested:
            self._recovery_crashes(where, state, devices, recovered, oracle)

    def _cut(self, where: str, disk: Disk, oracles: list[Oracle]) -> None:
        """One of the two hosts loses power; the other goes on, which is here: its SDS is started again."""
        cut, survivor = self.rng.sample(oracles, 2)
        if not survivor.settled(disk):
            return
        self.findings.cuts += 1
        state = {}
        for oracle in oracles:
            state |= disk.state(self.rng, None if oracle is cut else "all", oracle.root)
        self.bench.make(state)
        try:
            problems = problems_of_a_cut(self.bench.directory, len(cut.opened), oracles)
        except Exception as error:
            problems = [f"the pair does not come to agree: {error!r}"]
        if problems:
            kept = Path(tempfile.mkdtemp(prefix="pfvol-cut-"))
            Bench(kept).make(state)
            problems[0] += f" (as they were started: {kept})"
        self.findings.add(f"{where}, SDS {cut.sds} cut", problems)

    def _again(self, devices: list[str], first: dict[str, Recovered]) -> list[str]:
        problems = []
        for device, second in self.bench.recover(devices, self.rng.randbytes(16)).items():
            one = first[device]
            if (one.used, one.blocks, one.tags) != (second.used, second.blocks, second.tags):
                problems.append(f"{device}: a second recovery made something else of it")
            if gone := (one.dirty | one.freed) - (second.dirty | second.freed):
                problems.append(f"{device}: a second recovery does not report {gone}")
        return problems

    def _recovery_crashes(
        self, where: str, state: FilesByPath, devices: list[str], expected: dict[str, Recovered], before: Oracle
    ) -> None:
        self.findings.recoveries += 1
        self.bench.make(state)
        inodes = self.bench.inodes()
        opened, found = {}, {}
        with Recording(self.bench.directory, seed=self.rng.randrange(1 << 31)) as recording:
            for device in devices:
                opened[device] = BlockDevice.open(self.bench.directory / device, boot_id=self.rng.randbytes(16))
                summary = opened[device].recover()
                found[device] = self.bench.look(device, opened[device], summary["lost_reasons"] + taken_for_rot(summary), False)
            recording.mark("recovered")
            # On one of them: what a sync of one device promises is not known of the others.
            volume = FRESH_VOLUME + self.depth
            DeviceWork(opened[self.rng.choice(devices)], recording, self.rng, before.sds, volume=volume).run(12)
            for one in opened.values():
                one.close(clean=False)
        names = Names(before.names)
        oracle = copy.deepcopy(before, {id(before.names): names})
        disk = Disk.of(state, inodes, self.in_place)
        oracle.adopt(disk)
        oracle.reported |= set().union(*(one.dirty | one.freed for one in expected.values()))
        oracle.when_recovered = found
        deeper = Explorer(
            Bench(self.bench.directory.with_name(f"deeper{self.depth + 1}")),
            self.rng,
            self.spread / 2,
            self.nested / 4,
            0.0,
            self.in_place,
            depth=self.depth + 1,
            findings=self.findings,
            limit=self.limit,
        )
        deeper.run(f"{where}; then recovery", recording.operations, disk, [oracle])
