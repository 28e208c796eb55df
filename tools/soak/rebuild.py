"""A server is lost for good, and the rest make its copies again: how fast, how evenly, and what clients notice of it.

    python -m tools.soak.rebuild        (make rebuild)

The plan's scenario B with binary sizes: four SDSs of 2 GiB and two thick volumes of 1.5 GiB, on one mount each, full of
blocks that are known, under 1000 and 500 IOs a second, each read of which is compared. An SDS is killed and stays away.
The pool and the volumes have to be DEGRADED at once, the rebuild has to begin by itself after the pool's delay, its
progress must not go back, its rate must be the pool's limit, and in the end all chunks have two copies and no slot is
free. Then the SDS comes back, gets its share again, and the next round begins: one per limit, one in which the limit
changes on the way, and one in which the rebuild is cancelled and started in turns, to compare what clients notice.
Last, every block is read back, and ``vol verify`` has to be clean. Ends with 1 if anything was not so.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pfvol.constants import CHUNK_SIZE_BYTES
from pfvol.errors import ConflictError
from pfvol.sdc import launch
from tools.demo.hosts import POOL, Hosts, Shape
from tools.soak.hosted import add_options, on_hosts, report
from tools.soak.load import two_copies
from tools.soak.paced import FILLED, Io, read_log
from tools.soak.world import SoakError

MIB = 1024**2
MB = 1_000_000
VOLUMES = {"one": 1000, "two": 500}  # IOs a second, as in the plan
SDSS = 4
LIMIT_FREE = 1000  # MB/s, while a server that has come back gets its share
POLL_SECONDS = 0.02
SAMPLE_SECONDS = 0.1
FILL_SECONDS = 300.0
END_SECONDS = 300.0
DEGRADED_SECONDS = 3.0
BEGIN_SECONDS = 10.0  # from the end of the delay
ROUND_SECONDS = 600.0
SETTLED_SECONDS = 2.0
TURN_SECONDS = 2.0
TURN_BEGINS_SECONDS = 0.5  # until the SDSs know of it
ETA_FROM = 0.1  # of the rebuild: before, little is known of its speed
ROW = "{:>22} {:>9} {:>10} {:>9} {:>9} {:>12} {:>17} {:>8}"


class Sample(NamedTuple):
    """A status of the rebuild as the REST API gave it."""

    at: float
    state: str
    percent: float
    bytes: int
    eta_seconds: float | None
    degraded: int


class Span(NamedTuple):
    begin: float
    end: float


@dataclass
class Round:
    """One loss of a server."""

    what: str
    victim: str
    limit_mbps: int
    rate_mbps: float = 0.0
    degraded_seconds: float = 0.0  # until the pool and the volumes said so
    begun_seconds: float = 0.0  # until the rebuild was under way
    took_seconds: float = 0.0  # from then to its end
    bytes: int = 0
    free_slots: int = 0
    eta_error: float = 0.0  # median, as a part of what was really left
    p99_ms: dict[str, float] = field(default_factory=dict)
    ratio: float = 0.0
    without: list[Span] = field(default_factory=list)
    during: list[Span] = field(default_factory=list)


def slope(samples: Sequence[Sample]) -> float:
    """Bytes a second: the line through the moments at which the count rose."""
    rises = [later for earlier, later in pairwise(samples) if later.bytes > earlier.bytes]
    if len(rises) < 2:
        return 0.0
    return statistics.linear_regression([one.at for one in rises], [float(one.bytes) for one in rises]).slope


def p99(ios: Sequence[Io], spans: Sequence[Span]) -> float:
    """Milliseconds."""
    found = sorted(io.seconds for io in ios for span in spans if span.begin <= io.begin < span.end)
    return 1000 * found[len(found) * 99 // 100] if found else 0.0


class Clients:
    """The programs that read and write."""

    def __init__(self, hosts: Hosts, seed: int) -> None:
        self.logs = {name: hosts.base / f"{name}.ios" for name in VOLUMES}
        self.programs: dict[str, subprocess.Popen[str]] = {}
        for number, (name, iops) in enumerate(VOLUMES.items()):
            path = hosts.mountpoint(hosts.shape.clients[number]) / name
            argv = [sys.executable, "-m", "tools.soak.paced", str(path), str(self.logs[name]), "--iops", str(iops)]
            argv += ["--seed", str(seed + number), "--volume-number", str(number)]
            self.programs[name] = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=dict(launch.environment())
            )

    def await_filled(self) -> None:
        for name, program in self.programs.items():
            assert program.stdout is not None
            if program.stdout.readline().strip() != FILLED:
                raise SoakError(f"volume {name} could not be filled: {program.communicate(timeout=END_SECONDS)[0]}")

    def check(self) -> None:
        for name, program in self.programs.items():
            if program.poll() is not None:
                raise SoakError(f"what reads and writes {name} has ended: {program.communicate()[0]}")

    def end(self) -> tuple[list[Io], list[str]]:
        """Every IO, and what was wrong."""
        for program in self.programs.values():
            program.terminate()
        problems = []
        for program in self.programs.values():
            said, _ = program.communicate(timeout=END_SECONDS)
            problems += said.splitlines() if program.returncode else []
        return [io for log in self.logs.values() for io in read_log(log)], problems

    def kill(self) -> None:
        for program in self.programs.values():
            program.kill()
            program.communicate()


@dataclass
class Rebuilds:
    """A cluster whose servers are lost one after the other."""

    hosts: Hosts
    rng: random.Random
    clients: Clients
    delay_seconds: int
    quiet_seconds: float
    rounds: list[Round] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    # -- what a round consists of

    @contextmanager
    def round(self, what: str, limit_mbps: int) -> Iterator[Round]:
        """Everybody has a share; a server is lost. In the block the rebuild is under way; after it, it has ended."""
        if self.rounds:
            self._bring_back(self.rounds[-1].victim)
        one = Round(what, self.rng.choice(self.hosts.shape.servers), limit_mbps)
        self.set_limit(limit_mbps)
        one.without.append(self.wait(self.quiet_seconds))
        self.hosts.kill(one.victim)
        killed = time.monotonic()
        one.degraded_seconds = self.await_(self._all_degraded, DEGRADED_SECONDS) - killed
        begun = self.await_(self._copying, self.delay_seconds + BEGIN_SECONDS)
        one.begun_seconds = begun - killed
        if one.begun_seconds < self.delay_seconds:
            self.problems.append(f"{what}: the rebuild began {one.begun_seconds:.1f} s after the kill")
        yield one
        one.free_slots = self._judge_end(one)
        one.without.append(self.wait(self.quiet_seconds))
        self.rounds.append(one)
        print(describe(one), flush=True)

    def follow(self, one: Round, at: Callable[[Sample], None] = lambda _: None) -> list[Sample]:
        """Until the rebuild has ended: every status that there was."""
        samples = [self.status()]
        while samples[-1].state == "IN_PROGRESS":
            if samples[-1].at > samples[0].at + ROUND_SECONDS:
                raise SoakError(f"{one.what}: the rebuild does not end: {samples[-1]}")
            self.wait(SAMPLE_SECONDS)
            samples.append(self.status())
            at(samples[-1])
        if samples[-1].state != "COMPLETED":
            raise SoakError(f"{one.what}: the rebuild is {samples[-1].state}: {self._reason()}")
        self._judge_progress(one, samples)
        one.took_seconds = samples[-1].at - samples[0].at
        one.bytes = samples[-1].bytes
        one.eta_error = eta_error(samples)
        return samples

    def _bring_back(self, victim: str) -> None:
        self.set_limit(LIMIT_FREE)
        self.hosts.start(victim)
        self.hosts.await_health(ROUND_SECONDS)
        since = time.monotonic()
        while time.monotonic() < since + SETTLED_SECONDS:
            if self.status().state == "IN_PROGRESS":
                since = time.monotonic()
            self.wait(SAMPLE_SECONDS)

    # -- what has to be so

    def _all_degraded(self) -> bool:
        with self.hosts.client() as api:
            pool, volumes = api.get(f"/pool/{POOL}"), api.get("/vol/list")
        return bool(pool["health"] == "DEGRADED" and all(volume["state"] == "DEGRADED" for volume in volumes))

    def _copying(self) -> bool:
        status = self.status()
        return status.state == "IN_PROGRESS" and status.bytes > 0

    def _judge_progress(self, one: Round, samples: Sequence[Sample]) -> None:
        for earlier, later in pairwise(samples):
            if later.percent < earlier.percent or later.bytes < earlier.bytes:
                self.problems.append(f"{one.what}: progress went back: {earlier} {later}")
            if later.degraded > earlier.degraded:
                self.problems.append(f"{one.what}: more chunks were degraded than before: {earlier} {later}")
        if samples[-1].percent != 100:
            self.problems.append(f"{one.what}: it ended at {samples[-1].percent} %")

    def _judge_end(self, one: Round) -> int:
        with self.hosts.client() as api:
            health = api.get(f"/pool/{POOL}/health")
            volumes = api.get("/vol/list")
            servers = [sds for sds in api.get("/sds/list") if sds["name"] != one.victim]
        if health["health"] != "OK" or any(volume["state"] != "IN_USE" for volume in volumes):
            self.problems.append(f"{one.what}: after the rebuild the pool is {health['health']}: {health['reasons']}")
        self.problems += two_copies(self.hosts, list(VOLUMES), verify=False)
        return sum(sds["total_capacity_bytes"] // CHUNK_SIZE_BYTES - sds["chunk_count"] for sds in servers)

    # -- the cluster

    def status(self) -> Sample:
        with self.hosts.client() as api:
            row: dict[str, Any] = api.get(f"/rebuild/status/{POOL}")
        eta, degraded = row["estimated_time_remaining_seconds"], row["degraded_chunks"]
        return Sample(time.monotonic(), row["state"], row["progress_percent"], row["bytes_rebuilt"], eta, degraded)

    def _reason(self) -> str:
        with self.hosts.client() as api:
            return str(api.get(f"/rebuild/status/{POOL}")["reason"])

    def set_limit(self, limit_mbps: int) -> None:
        with self.hosts.client() as api:
            api.patch(f"/pool/{POOL}", rebuild_rate_limit_mbps=limit_mbps)

    def switch(self, verb: str) -> None:
        with self.hosts.client() as api:
            api.post(f"/rebuild/{verb}/{POOL}")

    def wait(self, seconds: float) -> Span:
        begin = time.monotonic()
        time.sleep(seconds)
        self.clients.check()
        return Span(begin, time.monotonic())

    def await_(self, condition: Callable[[], bool], seconds: float) -> float:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise SoakError(f"{condition} is not so within {seconds:.0f} s: {self.hosts.health()} {self.status()}")
            self.wait(POLL_SECONDS)
        return time.monotonic()

    # -- the rounds

    def at_limit(self, limit_mbps: int) -> None:
        """One rebuild at one limit."""
        with self.round(f"{limit_mbps} MB/s", limit_mbps) as one:
            samples = self.follow(one)
            one.rate_mbps = slope(samples) / MB
            one.during.append(Span(samples[0].at, samples[-1].at))

    def changing(self, limits: Sequence[int]) -> None:
        """The limit changes when a part of the chunks has been copied; a round of its own is noted for each."""
        with self.round("all of the next", limits[-1]) as whole:
            parts: list[tuple[int, list[Sample]]] = []

            def change(sample: Sample) -> None:
                index = min(int(sample.percent * len(limits) / 100), len(limits) - 1)
                if index == len(parts):
                    self.set_limit(limits[index])
                    parts.append((limits[index], []))
                parts[-1][1].append(sample)

            change(self.status())
            samples = self.follow(whole, change)
            whole.during.append(Span(samples[0].at, samples[-1].at))
        for limit, part in parts:
            settled = [sample for sample in part if sample.at > part[0].at + 2 * TURN_BEGINS_SECONDS]
            one = Round(f"changed to {limit}", whole.victim, limit, slope(settled) / MB)
            self.rounds.append(one)
            print(describe(one), flush=True)

    def turns(self, limit_mbps: int) -> None:
        """Cancelled and started in turns, so that the clients' IO with and without it is of the same moments."""
        with self.round(f"{limit_mbps} MB/s in turns", limit_mbps) as one:
            one.without.clear()
            while self.status().state == "IN_PROGRESS":
                self.wait(TURN_BEGINS_SECONDS)
                one.during.append(self.wait(TURN_SECONDS))
                if self.status().state != "IN_PROGRESS":
                    one.during.pop()
                    break
                try:
                    self.switch("cancel")
                except ConflictError:  # it has just ended
                    break
                self.wait(TURN_BEGINS_SECONDS)
                one.without.append(self.wait(TURN_SECONDS))
                self.switch("start")
                self.await_(lambda: self.status().state != "CANCELLED", DEGRADED_SECONDS)
            if self.status().state != "IDLE":  # else the last chunks came into their sets while it was cancelled
                self.follow(one)


def eta_error(samples: Sequence[Sample]) -> float:
    """By how much of the time that was really left the estimate was off, half of the time."""
    begin, end = samples[0].at, samples[-1].at
    judged = [one for one in samples if begin + ETA_FROM * (end - begin) < one.at < end - 1]
    errors = [abs(one.eta_seconds - (end - one.at)) / (end - one.at) for one in judged if one.eta_seconds is not None]
    return statistics.median(errors) if errors else 0.0


def describe(one: Round) -> str:
    return (
        f"{one.what}: {one.victim} lost, DEGRADED after {one.degraded_seconds:.2f} s, rebuild after "
        f"{one.begun_seconds:.1f} s: {one.bytes / MIB:.0f} MiB in {one.took_seconds:.1f} s, {one.rate_mbps:.1f} MB/s, "
        f"ETA off by {100 * one.eta_error:.0f} %, {one.free_slots} slots free"
    )


def table(rounds: Sequence[Round]) -> list[str]:
    lines = [ROW.format("round", "MB/s", "of limit", "MiB", "s", "ETA off by", "p99 ms, without", "ratio")]
    for one in rounds:
        latency = f"{one.p99_ms.get('during', 0):.2f}, {one.p99_ms.get('without', 0):.2f}"
        part = f"{one.rate_mbps / one.limit_mbps:.1%}" if one.rate_mbps else ""
        figures = [f"{one.rate_mbps:.1f}", part, f"{one.bytes / MIB:.0f}", f"{one.took_seconds:.1f}"]
        lines.append(ROW.format(one.what, *figures, f"{one.eta_error:.0%}", latency, f"{one.ratio:.2f}"))
    return lines


def measure_latency(rounds: Sequence[Round], ios: Sequence[Io]) -> None:
    """Pairs, one beside the other in time: the median of their ratios."""
    for one in rounds:
        pairs = list(zip(one.during, one.without, strict=False))
        if pairs:
            one.p99_ms = {"during": p99(ios, one.during), "without": p99(ios, one.without)}
            ratios = [p99(ios, [during]) / p99(ios, [without]) for during, without in pairs]
            one.ratio = statistics.median(ratios) if len(ratios) > 1 else one.p99_ms["during"] / one.p99_ms["without"]


def verdict(rounds: Sequence[Round], arguments: argparse.Namespace) -> list[str]:
    found = []
    for one in rounds:
        if one.rate_mbps and abs(one.rate_mbps - one.limit_mbps) > arguments.rate_error_max * one.limit_mbps:
            found.append(f"{one.what}: {one.rate_mbps:.1f} MB/s is not the limit of {one.limit_mbps}")
        if one.ratio > arguments.p99_ratio_max:
            found.append(f"{one.what}: the clients' p99 is {one.ratio:.1f} times what it is without: {one.p99_ms}")
        if one.free_slots:
            found.append(f"{one.what}: {one.free_slots} slots are free after it")
    return found


def run(hosts: Hosts, arguments: argparse.Namespace, rounds: list[Round]) -> list[str]:
    size_bytes = arguments.sds_mib * MIB * 3 // 4
    for sdc, volume in zip(hosts.shape.clients, VOLUMES, strict=True):
        hosts.volume(volume, size_bytes, [sdc], thick=True)
        hosts.mount(sdc, "direct")
    with hosts.client() as api:
        api.patch(f"/pool/{POOL}", rebuild_delay_seconds=arguments.delay)
    clients = Clients(hosts, arguments.seed)
    try:
        clients.await_filled()
        print("filled", flush=True)
        rebuilds = Rebuilds(
            hosts, random.Random(arguments.seed), clients, arguments.delay, arguments.quiet_seconds, rounds
        )
        for limit in arguments.limits:
            rebuilds.at_limit(limit)
        if arguments.change:
            rebuilds.changing(sorted(arguments.limits))
        for limit in arguments.turns:
            rebuilds.turns(limit)
        ios, problems = clients.end()
    finally:
        clients.kill()
    measure_latency(rounds, ios)
    return rebuilds.problems + problems + verdict(rounds, arguments) + two_copies(hosts, list(VOLUMES))


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def main() -> int:
    parser = argparse.ArgumentParser(description="How fast are lost copies made again, and what do clients notice?")
    parser.add_argument("--limits", type=numbers, default=[100, 20, 400], help="MB/s: a round each")
    parser.add_argument("--change", action=argparse.BooleanOptionalAction, default=True, help="of the limit on the way")
    parser.add_argument("--turns", type=numbers, default=[20, 100], help="MB/s: a round each, with pauses")
    parser.add_argument("--sds-mib", type=int, default=2048, help="room of each SDS; the volumes have three quarters")
    parser.add_argument("--delay", type=int, default=3, help="seconds from the loss to the rebuild")
    parser.add_argument("--quiet-seconds", type=float, default=10.0, help="without a rebuild, before and after each")
    parser.add_argument("--rate-error-max", type=float, default=0.1)
    parser.add_argument("--p99-ratio-max", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=Path("rebuild.results.json"))
    add_options(parser, "rebuild")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    rounds: list[Round] = []
    shape = Shape(sds=SDSS, sdcs=len(VOLUMES), sds_bytes=arguments.sds_mib * MIB)
    found = on_hosts(arguments, shape, lambda hosts: run(hosts, arguments, rounds))
    return report(arguments, found, {"rounds": [asdict(one) for one in rounds]}, table(rounds))


if __name__ == "__main__":
    sys.exit(main())
