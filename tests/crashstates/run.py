"""Searches the states that a loss of power can leave on an SDS's disks: is what was flushed there, and nothing else?

    python -m tests.crashstates.run --states 50000        (make crashstates STATES=50000)

Records workloads (workloads.py) with a recorder that is preloaded into this process, makes states of the disk after
every operation (disk.py), has the product recover each (explore.py) and judges what it finds (oracle.py). Prints what
it looked at; ends with 1 when anything is wrong. ``--mistakes`` leaves out one sync after the other from the recordings
instead: each has to be found.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from tests.crashstates import recording
from tests.crashstates.disk import Disk
from tests.crashstates.explore import Bench, Explorer, Findings
from tests.crashstates.mistakes import MISTAKES, Mistake
from tests.crashstates.oracle import Names, Oracle
from tests.crashstates.recording import CREATE, MKDIR, Operation, Recording
from tests.crashstates.workloads import ROOTS, SYNC_DELAY_US, WORKLOADS, Workload

WORLD = "world"  # states are made where they were recorded: an SDS remembers its devices by their paths
SHOWN = 4  # of the problems of a workload
ENDS = 1.2  # distinct states after an operation, without those between the two ends
SPREAD_MAX = 2.0  # states between the two ends, after each operation: rather another recording than more of one
RECORDINGS = 3  # of a workload with a mistake
MISTAKE_STATES = 2500
MEMORY = Path("/dev/shm")


@dataclass
class Search:
    directory: Path
    rng: random.Random
    nested: float
    cuts: float

    def record(self, workload: Workload) -> list[Operation]:
        world = self.directory / WORLD
        shutil.rmtree(world, ignore_errors=True)
        world.mkdir()
        seed = self.rng.randrange(1 << 31)
        recorded = Recording(world, sync_delay_us=SYNC_DELAY_US, seed=seed, file_system=workload.file_system)
        with recorded:
            workload.run(world, recorded, random.Random(seed))
        return recorded.operations

    def explore(self, workload: Workload, states: int, mistake: Mistake | None = None) -> Findings:
        """About ``states`` of a recording of the workload, fewer when it has fewer."""
        operations = self.record(workload)
        if mistake is not None:
            operations = mistake.leave_out(operations)
        changing = sum(operation.kind > CREATE for operation in operations)
        each = states / max(changing, 1)
        spread, share = min(SPREAD_MAX, max(0.0, each - ENDS)), min(1.0, each / ENDS)
        cuts, in_place = (self.cuts, True) if mistake is None else (0.0, mistake.in_place)
        explorer = Explorer(Bench(self.directory / WORLD), self.rng, spread, self.nested, cuts, in_place, share=share)
        names = Names()
        oracles = [Oracle(root, sds, names) for sds, root in ROOTS.items() if _concerned(operations, root)]
        return explorer.run(workload.name, operations, Disk(in_place), oracles)

    def search(self, workload: Workload, states: int) -> Findings:
        """At least ``states``, of as many recordings as it takes."""
        findings = self.explore(workload, states)
        while findings.states < states and not findings.problems:
            findings.take(self.explore(workload, states - findings.states))
        return findings


def _concerned(operations: list[Operation], root: str) -> bool:
    return any(one.kind in (CREATE, MKDIR) and one.data.startswith(root.encode()) for one in operations)


def search_all(search: Search, states: int, workloads: list[Workload]) -> bool:
    total, started = Findings(), time.monotonic()
    for workload in workloads:
        begun = time.monotonic()
        findings = search.search(workload, -(-states // len(workloads)))
        total.take(findings)
        print(f"{workload.name}: {_told(findings)}, {time.monotonic() - begun:.1f} s", flush=True)
        for problem in findings.problems[:SHOWN]:
            print(f"  WRONG: {problem}", flush=True)
    result = f"FAILED with {len(total.problems)} findings" if total.problems else "passed"
    print(f"{result}: {len(workloads)} workloads, {_told(total)}, {time.monotonic() - started:.0f} s")
    return not total.problems


def _told(findings: Findings) -> str:
    return (
        f"{findings.states} states after {findings.operations} operations, "
        f"{findings.recoveries} recoveries crashed again, {findings.cuts} pairs with one SDS cut"
    )


def search_mistakes(search: Search, states: int, mistakes: Sequence[Mistake]) -> bool:
    missed = 0
    for mistake in mistakes:
        workload = next(one for one in WORKLOADS if one.name == mistake.workload)
        findings = Findings()
        for _ in range(RECORDINGS):
            findings.take(search.explore(workload, states, mistake))
            if findings.problems:
                break
        missed += not findings.problems
        what = f"found after {findings.states} states: {findings.problems[0]}" if findings.problems else "NOT FOUND"
        print(f"{mistake.name}: {what}", flush=True)
    print(f"{len(mistakes) - missed} of {len(mistakes)} mistakes found")
    return not missed


def main() -> int:
    parser = argparse.ArgumentParser(description="the states that a loss of power can leave on an SDS's disks")
    parser.add_argument("--states", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument(
        "--nested", type=float, default=0.002, help="share of the states whose recovery is searched too"
    )
    parser.add_argument("--cuts", type=float, default=0.001, help="after how many operations a pair is made to agree")
    parser.add_argument("--mistakes", action="store_true", help="leave out one sync after the other: is it found?")
    parser.add_argument("--only", default="", help="workloads with this in their names")
    parser.add_argument("--every", type=int, default=1, help="with --mistakes: each n-th of them")
    arguments = parser.parse_args()
    recording.preloaded()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    print(f"seed {arguments.seed} (of the random choices: the engine's threads take turns as they like)", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="pfvol-crashstates-", dir=MEMORY if MEMORY.is_dir() else None))
    search = Search(directory, random.Random(arguments.seed), arguments.nested, arguments.cuts)
    chosen = [one for one in WORKLOADS if arguments.only in one.name]
    try:
        if arguments.mistakes:
            good = search_mistakes(search, MISTAKE_STATES, MISTAKES[:: arguments.every])
        else:
            good = search_all(search, arguments.states, chosen)
    finally:
        shutil.rmtree(directory)
        recording.cleanup()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
