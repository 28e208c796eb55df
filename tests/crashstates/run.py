"""Searches the states that a loss of power can leave on an SDS's disks: is what was flushed there, and nothing else?

    python -m tests.crashstates.run --states 50000        (make crashstates STATES=50000)

Records workloads (workloads.py) with a recorder that is preloaded into this process, makes states of the disk after every
operation (disk.py), has the product recover each (explore.py) and judges what it finds (oracle.py). Prints what it looked
at; ends with 1 when anything is wrong. ``--mistakes`` leaves out one sync after the other from the recordings instead: each
has to be found.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from tests.crashstates import recording
from tests.crashstates.disk import Disk
from tests.crashstates.explore import Bench, Explorer, Findings
from tests.crashstates.mistakes import MISTAKES, Mistake
from tests.crashstates.oracle import Names, Oracle
from tests.crashstates.recording import CREATE, MARK, Operation, Recording
from tests.crashstates.workloads import ROOTS, SYNC_DELAY_US, WORKLOADS, Workload

SHOWN = 4  # of the problems of a workload
MEMORY = Path("/dev/shm")


@dataclass
class Search:
    directory: Path
    rng: random.Random
    nested: float = 0.0

    def record(self, workload: Workload) -> list[Operation]:
        world = self.directory / "world"
        world.mkdir()
        seed = self.rng.randrange(1 << 31)
        recorded = Recording(world, sync_delay_us=SYNC_DELAY_US, seed=seed, file_system=workload.file_system)
        with recorded:
            workload.run(world, recorded, random.Random(seed))
        shutil.rmtree(world)
        return recorded.operations

    def explore(
        self, workload: Workload, operations: list[Operation], states: int, *, mistake: Mistake | None = None, in_place: bool = True
    ) -> Findings:
        """About ``states`` of them."""
        if mistake is not None:
            operations = mistake.leave_out(operations)
        changing = sum(operation.kind > CREATE for operation in operations)
        spread = max(0.0, states / max(changing, 1) - 1.2)
        explorer = Explorer(Bench(self.directory / "state"), self.rng, spread, self.nested, in_place)
        names = Names()
        oracles = [Oracle(root, sds, names) for sds, root in ROOTS.items() if _concerned(operations, root)]
        return explorer.run(workload.name, operations, Disk(in_place), oracles)


def _concerned(operations: list[Operation], root: str) -> bool:
    return any(operation.kind == CREATE and operation.data.startswith(root.encode()) for operation in operations)


def search(found: Search, states: int) -> bool:
    total, operations, recoveries, started = 0, 0, 0, time.monotonic()
    good = True
    for number, workload in enumerate(WORKLOADS):
        begun, cpu = time.monotonic(), time.process_time()
        wanted = (states - total) // (len(WORKLOADS) - number)
        recorded = found.record(workload)
        findings = found.explore(workload, recorded, wanted)
        while findings.states < wanted and not findings.problems:  # fewer distinct ones than asked for: another run of it
            more = found.explore(workload, found.record(workload), wanted - findings.states)
            findings.states += more.states
            findings.operations += more.operations
            findings.recoveries += more.recoveries
            findings.problems += more.problems
            if not more.states:
                break
        total, operations, recoveries = (
            total + findings.states, operations + findings.operations, recoveries + findings.recoveries,
        )  # fmt: skip
        print(
            f"{workload.name}: {findings.states} states of {findings.operations} operations, {findings.recoveries} recoveries "
            f"recorded in their turn, {time.monotonic() - begun:.1f} s ({time.process_time() - cpu:.1f} s of CPU)",
            flush=True,
        )
        for problem in findings.problems[:SHOWN]:
            print(f"  WRONG: {problem}", flush=True)
        good = good and not findings.problems
    print(
        f"{'passed' if good else 'FAILED'}: {len(WORKLOADS)} workloads, {total} states of {operations} operations, "
        f"{recoveries} recoveries crashed again, {time.monotonic() - started:.0f} s"
    )
    return good


def search_mistakes(found: Search, states: int) -> bool:
    good = True
    for mistake in MISTAKES:
        for attempt in range(3):
            workload = next(one for one in WORKLOADS if one.name == mistake.workload)
            findings = found.explore(workload, found.record(workload), states, mistake=mistake, in_place=mistake.in_place)
            if findings.problems:
                print(f"{mistake.name}: found after {findings.states} states: {findings.problems[0]}", flush=True)
                break
        else:
            good = False
            print(f"{mistake.name}: NOT FOUND in {attempt + 1} runs of {states} states", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="the states that a loss of power can leave on an SDS's disks")
    parser.add_argument("--states", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--nested", type=float, default=0.002, help="share of the states whose recovery is searched too")
    parser.add_argument("--mistakes", action="store_true", help="leave out one sync after the other: is it found?")
    parser.add_argument("--only", help="one workload")
    arguments = parser.parse_args()
    recording.preloaded()
    print(f"seed {arguments.seed}: python -m tests.crashstates.run --states {arguments.states} --seed {arguments.seed}", flush=True)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    directory = Path(tempfile.mkdtemp(prefix="pfvol-crashstates-", dir=MEMORY if MEMORY.is_dir() else None))
    found = Search(directory, random.Random(arguments.seed), arguments.nested)
    if arguments.only:
        globals()["WORKLOADS"] = tuple(one for one in WORKLOADS if one.name == arguments.only)
    try:
        good = (search_mistakes if arguments.mistakes else search)(found, arguments.states)
    finally:
        shutil.rmtree(directory)
        recording.cleanup()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
