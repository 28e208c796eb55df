"""Programs that read and write under what is done to a cluster, and what they saw: for the soak and failover programs.

``Load`` runs one ``tools.soak.clients`` per mount on every volume; ``stop`` ends them. Everything they did in one round
is judged together with a read of every block afterwards, and what is there then is what the next round begins with.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfvol import childprocess
from pfvol.sdc import launch
from tools.demo.hosts import Hosts
from tools.soak import history
from tools.soak.clients import Log, Place
from tools.soak.memory import COMPARED_SAMPLES, GROWTH_MAX, Sample, growth, look
from tools.soak.world import SoakError

STAMPS_PER_PROGRAM = 1 << 32
START_SECONDS = 60.0
END_SECONDS = 90.0  # an IO may wait for a server as long as the mount lets it: 60 s, then it fails
POLL_SECONDS = 0.02
PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class Pattern:
    """What each program does."""

    blocks: int = 2000
    threads: int = 4
    rate: float = 600
    writes: float = 0.4

    def options(self) -> list[str]:
        words = {"blocks": self.blocks, "threads": self.threads, "rate": self.rate, "writes": self.writes}
        return [word for name, value in words.items() for word in (f"--{name}", str(value))]


@dataclass
class Load:
    """The programs of one cluster, round by round."""

    hosts: Hosts
    volumes: Sequence[str]
    pattern: Pattern
    known: dict[Place, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)  # all that was seen of the first block that is wrong
    operations: int = 0
    errors: int = 0
    again: int = 0  # writes that were carried out twice where that is allowed for
    _programs: int = 0

    @contextmanager
    def running(self, seed: int) -> Iterator[dict[str, Path]]:
        """While the block runs the programs do; in it are their logs, by host. They have ended when it is left."""
        logs, programs = {}, []
        try:
            for sdc in self.hosts.shape.clients:
                logs[sdc], program = self._start(sdc, seed, *self.pattern.options())
                programs.append(program)
            deadline = time.monotonic() + START_SECONDS
            while not all(log.exists() and log.stat().st_size for log in logs.values()):
                if time.monotonic() > deadline or any(program.poll() is not None for program in programs):
                    raise SoakError("the programs do not come to read and write")
                time.sleep(POLL_SECONDS)
            yield logs
            for program in programs:
                program.terminate()
            self._await(programs)
        finally:
            for program in programs:
                program.kill()
                program.wait()

    def read_back(self, sdcs: Sequence[str] | None = None) -> list[Path]:
        """Reads every block, through every mount (or some) at once; the logs."""
        started = [
            self._start(sdc, 0, "--read-back", "--blocks", str(self.pattern.blocks))
            for sdc in sdcs or self.hosts.shape.clients
        ]
        try:
            self._await([program for _, program in started])
        finally:
            for _, program in started:
                program.kill()
                program.wait()
        return [log for log, _ in started]

    def _start(self, sdc: str, seed: int, *options: str) -> tuple[Path, subprocess.Popen[bytes]]:
        self._programs += 1
        log = self.hosts.base / f"io{self._programs}"
        argv = [sys.executable, "-m", "tools.soak.clients", str(log)]
        argv += [str(self.hosts.mountpoint(sdc) / volume) for volume in self.volumes]
        argv += ["--seed", f"{seed * 100 + self._programs}", "--first-stamp", str(self._programs * STAMPS_PER_PROGRAM)]
        environment = dict(launch.environment())
        return log, subprocess.Popen([*argv, *options], stdin=subprocess.DEVNULL, env=environment)

    def _await(self, programs: Sequence[subprocess.Popen[bytes]]) -> None:
        deadline = time.monotonic() + END_SECONDS
        for program in programs:
            try:
                code = program.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise SoakError(f"an IO does not come back within {END_SECONDS:.0f} s") from None
            if code:
                raise SoakError(f"a program that reads and writes ended with {code}")

    def judge(self, paths: Sequence[Path], forgetful: Sequence[tuple[float, float]] = ()) -> Log:
        """Adds what is wrong with what these logs, a round with its read-back, say; removes them.

        ``forgetful``: from when to when all servers that know of an operation may have been restarted.
        """
        everything = Log()
        for path in paths:
            everything.read(path)
            path.unlink()
        self.operations += sum(map(len, everything.operations.values()))
        self.errors += len(everything.errors)
        self.problems += [f"IO error: {error}" for error in everything.errors[:PROBLEMS_SHOWN]]
        self.problems += everything.torn[:PROBLEMS_SHOWN]
        for place, operations in sorted(everything.operations.items()):
            before = self.known.get(place, 0)
            found, again = history.judge(operations, before, _under_way(operations, forgetful))
            self.again += len(again)
            if found and not self.evidence:
                self.evidence = [f"{place} had {before:#x}", *map(str, sorted(operations, key=lambda one: one.begin))]
            self.problems += [f"volume {place[0]} block {place[1]}: {problem}" for problem in found]
            self.known[place] = history.last_value(operations, before)
        return everything


def _under_way(operations: Sequence[history.Operation], spans: Sequence[tuple[float, float]]) -> set[int]:
    """The writes that were not answered yet at some moment of these."""
    return {
        one.value
        for one in operations
        if one.is_write and any(one.begin < until and one.end > since for since, until in spans)
    }


@dataclass
class Growth:
    """Memory and descriptors of every daemon, as long as each lives."""

    hosts: Hosts
    samples: list[Sample] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        names = [*self.hosts.shape.nodes, *self.hosts.shape.clients]
        found = {name: process for name in names if (process := self.hosts.process(name))}
        for name, process in found.items():
            self.samples.append(look(f"{name} (pid {process.pid})", process.pid, time.monotonic() - self.started))

    def problems(self, warm_up_seconds: float) -> list[str]:
        """Of the processes that lived long enough to say; one that was killed soon after its start has none."""
        found = []
        for name in sorted({sample.name for sample in self.samples}):
            taken = [sample for sample in self.samples if sample.name == name]
            warm_up_until = taken[0].at_seconds + warm_up_seconds
            if sum(sample.at_seconds >= warm_up_until for sample in taken) < 2 * COMPARED_SAMPLES:
                continue
            for figure, allowed in GROWTH_MAX.items():
                grown = growth(taken, figure, warm_up_until)
                if grown > allowed:
                    found.append(f"{name}: {figure} grew by {grown:,.0f}, and {allowed:,} is allowed")
        return found


def two_copies(hosts: Hosts, volumes: Sequence[str], *, verify: bool = True) -> list[str]:
    """What is wrong with the copies of these volumes: chunks without two in sync, and what ``vol verify`` finds."""
    found = []
    with hosts.client() as client:
        for volume in volumes:
            chunks = client.get(f"/vol/{volume}")["size_bytes"] // (4 * 1024**2)
            rows = [row for first in range(0, chunks, 1024) for row in client.get(f"/vol/{volume}/chunks", first=first)]
            degraded = [row["index"] for row in rows if row["is_degraded"] or not _in_sync_twice(row)]
            if degraded:
                found.append(f"{volume}: {len(degraded)} of {len(rows)} chunks have no two copies: {degraded[:10]}")
            report = client.post(f"/vol/{volume}/verify") if verify else {"problems": []}
            for problem in report["problems"][:PROBLEMS_SHOWN]:
                where = f"chunk {problem['chunk']} block {problem['block']}"
                found.append(f"vol verify {volume}: {where}: {problem['problem']} {problem['detail']}")
    return found


def _in_sync_twice(chunk: Mapping[str, Any]) -> bool:
    return len({copy["sds_id"] for copy in chunk["replicas"] if not copy["is_rebuilding"]}) == 2


def logs_of(hosts: Hosts) -> str:
    """The end of every daemon's log, for a report of what failed."""
    found = []
    for host in [*hosts.shape.nodes, *hosts.shape.clients]:
        for path in [hosts.log(host), *hosts.directory(host).glob("mounts/*.log")]:
            if tail := childprocess.log_tail(path):
                found.append(f"--- the end of {path.relative_to(hosts.base)}\n{tail}")
    return "\n".join(found)
