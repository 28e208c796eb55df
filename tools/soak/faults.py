"""Random faults against a cluster under load: nothing acknowledged may be lost, nothing stale read, no IO fail.

    python -m tools.soak.faults --minutes 60 --namespaces        (make soak MINUTES=60)

Programs on several mounts read and write the same blocks of several volumes (``tools.soak.clients``) while servers and
the MDM are killed, frozen and, with ``--namespaces``, cut from each other; each fault is undone after a while, and the
next comes when health is OK again, but for some that come on top of another on purpose. After each round of faults all
that every program saw is judged block by block (``tools.soak.history``). In the end both copies of everything must be
the same, and each SDS is taken away once while every block is read from what is left: a copy that nobody reads is none.

The journal has every fault with its time, as it happens, and what it did to IO. The same seed gives the same faults;
when exactly they meet which IO differs from run to run. Ends with 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pfvol.errors import Error
from tools.demo.hosts import MDM, Hosts, HostsError, Shape, cluster
from tools.demo.network import NetworkError
from tools.soak.clients import Log
from tools.soak.load import Growth, Load, Pattern, logs_of, two_copies
from tools.soak.world import SoakError

MIB = 1024**2
VOLUMES = ("one", "two")
VOLUME_BYTES = 256 * MIB
ROUND_FAULTS = 20
CALM_SECONDS = (0.1, 0.8)  # between a fault that is over and the next
OVERLAP = 0.15  # of the faults have another on top
LONG_OUTAGE = 0.04  # of the kills last longer than the rebuild delay
LONG_OUTAGE_SECONDS = (10.5, 14.0)
HEALTH_SECONDS = 90.0
WARM_UP_SECONDS = 180.0


@dataclass(frozen=True)
class Fault:
    """What is done to whom, and for how long."""

    kind: str
    hosts: tuple[str, ...]
    seconds: float
    others: tuple[str, ...] = ()  # of a cut
    one_way: bool = False

    def inject(self, hosts: Hosts) -> None:
        if self.kind.startswith("kill"):
            hosts.kill(*self.hosts)
        elif self.kind.startswith("freeze"):
            hosts.freeze(*self.hosts)
        else:
            hosts.cut(self.hosts[0], *self.others, one_way=self.one_way)

    def undo(self, hosts: Hosts) -> None:
        if self.kind.startswith("kill"):
            hosts.start(*self.hosts)
        elif self.kind.startswith("freeze"):
            hosts.thaw(*self.hosts)
        else:
            hosts.heal()

    def document(self) -> dict[str, Any]:
        cut = {"from": self.others or "all", "one_way": self.one_way} if self.kind.startswith("cut") else {}
        return {"kind": self.kind, "hosts": self.hosts, "seconds": round(self.seconds, 3)} | cut


# -- what there is to do


def _outage_seconds(rng: random.Random) -> float:
    return rng.uniform(*LONG_OUTAGE_SECONDS) if rng.random() < LONG_OUTAGE else min(8.0, rng.expovariate(1 / 1.2))


def _freeze_seconds(rng: random.Random) -> float:
    return float(10 ** rng.uniform(-1, 1))


def _kill_sds(rng: random.Random, shape: Shape) -> Fault:
    return Fault("kill-sds", (rng.choice(shape.servers),), _outage_seconds(rng))


def _kill_mdm(rng: random.Random, shape: Shape) -> Fault:
    return Fault("kill-mdm", (MDM,), _outage_seconds(rng))


def _kill_several(rng: random.Random, shape: Shape) -> Fault:
    nodes = [*shape.servers, MDM]
    return Fault("kill-several", tuple(rng.sample(nodes, rng.randint(2, len(nodes)))), _outage_seconds(rng))


def _freeze_sds(rng: random.Random, shape: Shape) -> Fault:
    return Fault("freeze-sds", (rng.choice(shape.servers),), _freeze_seconds(rng))


def _freeze_mdm(rng: random.Random, shape: Shape) -> Fault:
    return Fault("freeze-mdm", (MDM,), _freeze_seconds(rng))


def _freeze_several(rng: random.Random, shape: Shape) -> Fault:
    nodes = [*shape.servers, MDM]
    return Fault("freeze-several", tuple(rng.sample(nodes, rng.randint(2, len(nodes)))), _freeze_seconds(rng))


def _cut_pair(rng: random.Random, shape: Shape) -> Fault:
    one, other = rng.sample([*shape.nodes, *shape.clients], 2)
    return Fault("cut-pair", (one,), _freeze_seconds(rng), (other,), one_way=rng.random() < 0.5)


def _cut_servers(rng: random.Random, shape: Shape) -> Fault:
    """Two SDSs that both reach the MDM, and do not reach each other."""
    one, other = rng.sample(shape.servers, 2)
    return Fault("cut-servers", (one,), _freeze_seconds(rng), (other,), one_way=rng.random() < 0.5)


def _cut_off(rng: random.Random, shape: Shape) -> Fault:
    one_way = rng.random() < 0.3
    return Fault("cut-off", (rng.choice([*shape.nodes, *shape.clients]),), _freeze_seconds(rng), one_way=one_way)


Draw = Callable[[random.Random, Shape], Fault]
KINDS: dict[str, tuple[int, Draw]] = {
    "kill-sds": (5, _kill_sds),
    "kill-mdm": (2, _kill_mdm),
    "kill-several": (1, _kill_several),
    "freeze-sds": (4, _freeze_sds),
    "freeze-mdm": (1, _freeze_mdm),
    "freeze-several": (1, _freeze_several),
    "cut-pair": (3, _cut_pair),
    "cut-servers": (3, _cut_servers),
    "cut-off": (2, _cut_off),
}


def draw(rng: random.Random, shape: Shape, kinds: Sequence[str]) -> list[Fault]:
    """The next fault, or two of which the second comes while the first lasts."""
    weights = [KINDS[kind][0] for kind in kinds]
    number = 2 if rng.random() < OVERLAP else 1
    return [KINDS[kind][1](rng, shape) for kind in rng.choices(kinds, weights, k=number)]


# -- the run


@dataclass
class Happened:
    """A fault, when it began, when it and its consequences were over, and what it did to IO."""

    faults: list[Fault]
    begun: float
    recovered: float = 0.0
    stalls: dict[str, float] = field(default_factory=dict)  # seconds by mount
    slowest: float = 0.0

    @property
    def kind(self) -> str:
        return "+".join(fault.kind for fault in self.faults)

    @property
    def is_forgetful(self) -> bool:
        """Whether all servers that know of an operation may have been restarted: one was, and another was away.

        Then a write that was not answered yet may be carried out again (docs/internals/protocol.md).
        """
        disturbed = {host for fault in self.faults for host in fault.hosts if host != MDM}
        killed = {host for fault in self.faults if fault.kind.startswith("kill") for host in fault.hosts if host != MDM}
        cut = any(fault.kind.startswith("cut") for fault in self.faults)
        return bool(killed) and (cut or len(disturbed) > 1)


class Journal:
    """One JSON document a line, written as it happens; times in seconds since the start of the run."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._started = time.monotonic()

    def write(self, what: str, **details: Any) -> None:
        at = round(details.pop("at", time.monotonic()) - self._started, 3)
        self._file.write(json.dumps({"at": at, "what": what} | details) + "\n")
        self._file.flush()


@dataclass
class Soak:
    """One run. ``problems`` says what was not as it must be."""

    hosts: Hosts
    rng: random.Random
    kinds: Sequence[str]
    journal: Journal
    load: Load
    growth: Growth
    happened: list[Happened] = field(default_factory=list)

    def begin(self) -> None:
        for volume in VOLUMES:
            self.hosts.volume(volume, VOLUME_BYTES, self.hosts.shape.clients)
        for sdc in self.hosts.shape.clients:
            self.hosts.mount(sdc, "direct")
        self.hosts.await_health(HEALTH_SECONDS)

    def round(self, number: int, faults: int, until: float) -> None:
        """Some faults under load, and the verdict on all that was seen; SoakError if there is none to give."""
        first = len(self.happened)
        with self.load.running(self.rng.randrange(2**31)) as logs:
            for _ in range(faults):
                if time.monotonic() > until:
                    break
                time.sleep(self.rng.uniform(*CALM_SECONDS))
                # Again: what the last fault led to may have been noticed only now.
                self.hosts.await_health(HEALTH_SECONDS)
                self._fault(draw(self.rng, self.hosts.shape, self.kinds))
            self.growth.look()
            ended = time.monotonic()
        self._measure(self.happened[first:], logs, ended)
        forgetful = [(one.begun, one.recovered) for one in self.happened[first:] if one.is_forgetful]
        seen = self.load.judge([*logs.values(), *self.load.read_back()], forgetful)
        if self.load.problems:
            return
        stall = max((max(one.stalls.values()) for one in self.happened[first:]), default=0.0)
        print(
            f"round {number}: {len(self.happened) - first} times a fault, longest stall {stall:.2f} s; "
            f"{len(seen.ended)} blocks read and written, all as they must be",
            flush=True,
        )

    def _fault(self, faults: list[Fault]) -> None:
        """From the first fault to health that is OK. All is undone, whatever happens."""
        one = Happened(faults, time.monotonic())
        self.happened.append(one)
        try:
            for index, fault in enumerate(faults):
                fault.inject(self.hosts)
                self.journal.write("fault", number=len(self.happened), **fault.document())
                time.sleep(fault.seconds * (self.rng.random() if index + 1 < len(faults) else 1.0))
        finally:
            for fault in faults:
                fault.undo(self.hosts)
        # A later one may have killed what an earlier one had undone.
        self.hosts.start(*self.hosts.shape.nodes)
        seconds = self.hosts.await_health(HEALTH_SECONDS)
        one.recovered = time.monotonic()
        self.journal.write("recovered", number=len(self.happened), after_seconds=round(seconds, 3))

    def _measure(self, happened: Sequence[Happened], logs: dict[str, Path], ended: float) -> None:
        seen = {}
        for sdc, path in logs.items():
            seen[sdc] = Log()
            seen[sdc].read(path)
        ends = [one.begun for one in happened[1:]] + [ended]
        for one, end in zip(happened, ends, strict=True):
            one.stalls = {sdc: round(log.longest_stall(one.begun, end), 3) for sdc, log in seen.items()}
            one.slowest = round(max(log.slowest(one.begun, end) for log in seen.values()), 3)
            number = self.happened.index(one) + 1
            self.journal.write("stall", number=number, kind=one.kind, seconds=one.stalls, slowest_io=one.slowest)

    def end(self) -> None:
        """Both copies of everything are there, and the same; nothing has grown."""
        self.hosts.await_health(HEALTH_SECONDS)
        self.load.problems += two_copies(self.hosts, VOLUMES)
        self.load.problems += self.growth.problems(WARM_UP_SECONDS)

    def read_each_copy(self) -> None:
        """Every block from what is left when one SDS is away, each in turn: in the end every copy was read."""
        sdc = self.hosts.shape.clients[:1]
        for sds in self.hosts.shape.servers:
            self.hosts.stop(sds)
            self.journal.write("reading without", sds=sds)
            paths = self.load.read_back(sdc)
            self.hosts.start(sds)
            self.hosts.await_health(HEALTH_SECONDS)
            self.load.judge(paths)
        self.load.problems += two_copies(self.hosts, VOLUMES)

    def print_table(self) -> None:
        print(f"{'fault':30} {'times':>6} {'stall s: median':>16} {'worst':>7} {'OK again s: median':>19} {'worst':>7}")
        for kind in sorted({one.kind for one in self.happened}):
            of_kind = [one for one in self.happened if one.kind == kind and one.recovered and one.stalls]
            if of_kind:
                stalls = [max(one.stalls.values()) for one in of_kind]
                recovery = [one.recovered - one.begun for one in of_kind]
                print(
                    f"{kind:30} {len(of_kind):6} {statistics.median(stalls):16.2f} {max(stalls):7.2f} "
                    f"{statistics.median(recovery):19.2f} {max(recovery):7.2f}"
                )


@contextmanager
def _told(problems: list[str]) -> Iterator[None]:
    """What ends a run is one of its problems."""
    try:
        yield
    except (SoakError, HostsError, NetworkError, Error, OSError, subprocess.TimeoutExpired) as error:
        problems.append(str(error))


def soak(hosts: Hosts, arguments: argparse.Namespace, journal: Journal) -> list[str]:
    """The whole run; what was not as it must be."""
    pattern = Pattern(rate=arguments.rate)
    load, until = Load(hosts, VOLUMES, pattern), time.monotonic() + arguments.minutes * 60
    run = Soak(hosts, random.Random(arguments.seed), arguments.kinds, journal, load, Growth(hosts))
    number = 0
    with _told(load.problems):
        run.begin()
        while not load.problems and time.monotonic() < until and len(run.happened) < arguments.faults:
            number += 1
            run.round(number, min(ROUND_FAULTS, arguments.faults - len(run.happened)), until)
        if not load.problems:
            run.end()
        if not load.problems and not arguments.quick:
            run.read_each_copy()
    run.print_table()
    faults = sum(len(one.faults) for one in run.happened)
    print(
        f"{faults} faults, {load.operations} blocks read and written, {load.errors} IO errors, "
        f"{load.again} unanswered writes carried out again after both servers had restarted",
        flush=True,
    )
    for line in load.evidence:
        journal.write("seen", operation=line)
    counts = {"faults": faults, "operations": load.operations, "errors": load.errors, "again": load.again}
    journal.write("verdict", **counts, problems=load.problems)
    if load.problems:
        print(logs_of(hosts))
    return load.problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Random faults under load: is anything lost, stale or refused?")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--faults", type=int, default=1_000_000, help="at most")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--kinds", type=_kinds, help=f"comma-separated, of {','.join(KINDS)}")
    parser.add_argument("--namespaces", action="store_true", help="hosts that can be cut from each other (needs root)")
    parser.add_argument("--sds", type=int, default=4)
    parser.add_argument("--sdcs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=600, help="IOs a second of each mount")
    parser.add_argument("--name", default="soak", help="of the hosts (python -m tools.demo.hosts)")
    parser.add_argument("--journal", type=Path, default=Path("soak.journal.jsonl"))
    parser.add_argument("--quick", action="store_true", help="do not read each copy alone in the end")
    parser.add_argument("--keep", action="store_true", help="leave the cluster of a run that failed")
    arguments = parser.parse_args()
    able = [kind for kind in KINDS if arguments.namespaces or not kind.startswith("cut")]
    arguments.kinds = arguments.kinds or able
    if wrong := sorted(set(arguments.kinds) - set(able)):
        parser.error(f"{', '.join(wrong)} needs --namespaces")
    print(f"seed {arguments.seed}; journal: {arguments.journal}", flush=True)
    problems: list[str] = []
    with arguments.journal.open("w") as file, _told(problems):
        journal = Journal(file)
        journal.write("begun", seed=arguments.seed, kinds=arguments.kinds, minutes=arguments.minutes)
        shape = Shape(sds=arguments.sds, sdcs=arguments.sdcs)
        with cluster(arguments.name, shape, loopback=not arguments.namespaces) as hosts:
            problems += soak(hosts, arguments, journal)
            hosts.kept = arguments.keep and bool(problems)
    print(
        "\n".join(f"FAILED: {problem}" for problem in problems) or "passed: nothing lost, nothing stale, no IO failed"
    )
    return 1 if problems else 0


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"no kind {wrong[0]}: there are {', '.join(KINDS)}")
    return kinds


if __name__ == "__main__":
    sys.exit(main())
