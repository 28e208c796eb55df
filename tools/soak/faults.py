"""Random faults against a cluster under load: nothing acknowledged may be lost, nothing stale read, no IO fail.

    python -m tools.soak.faults --minutes 60 --namespaces        (make soak MINUTES=60)

Programs on several mounts read and write the same blocks of several volumes (``tools.soak.clients``) while servers and
the MDM are killed, frozen, made to fail and, with ``--namespaces``, cut from each other, and disks err, rot, fill up
and get slow. Faults come in groups: most while others of their group last. Each is undone after a while, and the next
group comes when health is OK again. After each round of them all that every program saw is judged block by block
(``tools.soak.history``). In the end both copies of everything must be the same, and each SDS is taken away once while
every block is read from what is left: a copy that nobody reads is none.

What takes one copy of some blocks for good (``DISKS``) never meets what may take the other: then nothing would be left.

The journal has every fault with its time, as it happens, and what it did to IO. The same seed gives the same faults;
when exactly they meet which IO differs from run to run. Ends with 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pfvol.errors import ConflictError, Error, NotFoundError, TimedOutError, UnreachableError
from tools.demo.hosts import MDM, Hosts, HostsError, Shape
from tools.soak.clients import Log
from tools.soak.hosted import add_options, on_hosts, told, verdict
from tools.soak.load import Growth, Load, Pattern, logs_of, two_copies
from tools.soak.stamps import blocks_of

MIB = 1024**2
VOLUMES = ("one", "two")
VOLUME_BYTES = 256 * MIB
ROUND_GROUPS = 20
CALM_SECONDS = (0.0, 0.4)  # between a group that is over and the next
GROUP_SIZES = {1: 0.35, 2: 0.3, 3: 0.2, 4: 0.15}  # how many faults come together, how often
LONG_OUTAGE = 0.02  # of the kills last longer than the rebuild delay
LONG_OUTAGE_SECONDS = (10.5, 14.0)
OUTAGE_SECONDS_MEAN = 0.7
HEALTH_SECONDS = 90.0
ANSWER_SECONDS = 60.0  # that an order to an SDS is tried again while the MDM, or the SDS, is away
ANSWER_AGAIN_SECONDS = 0.1
SETTLED_SECONDS = 2.5  # a server that was away briefly is noticed, and its copies agree again
CORRUPTED_BLOCKS = 6
CLEAN_AGAIN_SECONDS = 30.0
CHUNK_BLOCKS = 1024
BLOCK_BYTES = 4096
WARM_UP_SECONDS = 180.0


@dataclass(frozen=True)
class Fault:
    """What is done to whom, and for how long."""

    kind: str
    hosts: tuple[str, ...]
    seconds: float
    others: tuple[str, ...] = ()  # of a cut
    one_way: bool = False
    orders: tuple[tuple[str, Any], ...] = ()  # what an SDS's disks are told to do, as REST takes it
    places: tuple[tuple[str, int], ...] = ()  # volume and block of what is corrupted, where the SDS has a copy

    @property
    def is_ordered(self) -> bool:
        """Brought about through the MDM, which has to be there."""
        return self.kind in DISKS or self.kind in ("fail-sds", "slow-disk")

    def inject(self, hosts: Hosts) -> None:
        if self.kind.startswith("kill"):
            hosts.kill(*self.hosts)
        elif self.kind.startswith("freeze"):
            hosts.freeze(*self.hosts)
        elif self.kind.startswith("cut"):
            hosts.cut(self.hosts[0], *self.others, one_way=self.one_way)
        elif self.kind == "fail-sds":
            _ordered(hosts, f"/sds/{self.hosts[0]}/fail", duration=self.seconds)
        elif self.kind == "corrupt":
            _corrupt(hosts, self.hosts[0], self.places)
        else:
            _ordered(hosts, f"/sds/{self.hosts[0]}/inject", **dict(self.orders))

    def undo(self, hosts: Hosts) -> None:
        if self.kind.startswith("kill"):
            hosts.start(*self.hosts)
        elif self.kind.startswith("freeze"):
            hosts.thaw(*self.hosts)
        elif self.kind.startswith("cut"):
            hosts.heal()
        elif self.kind == "corrupt":
            _await_clean(hosts, self.places)
        elif self.is_ordered and self.kind != "fail-sds":  # which ends by itself
            _ordered(hosts, f"/sds/{self.hosts[0]}/inject", clear=True)

    def document(self) -> dict[str, Any]:
        cut = {"from": self.others or "all", "one_way": self.one_way} if self.kind.startswith("cut") else {}
        disk = dict(self.orders) | ({"places": self.places} if self.places else {})
        return {"kind": self.kind, "hosts": self.hosts, "seconds": round(self.seconds, 3)} | cut | disk


def _ordered(hosts: Hosts, path: str, **body: Any) -> Any:
    """POST; again while the MDM is away, or the SDS from the MDM."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            with hosts.client() as client:
                return client.post(path, **body)
        except (UnreachableError, TimedOutError, ConflictError) as error:
            if time.monotonic() > deadline:
                raise HostsError(f"{path} was not carried out within {ANSWER_SECONDS:.0f} s: {error}") from None
        time.sleep(ANSWER_AGAIN_SECONDS)


def _corrupt(hosts: Hosts, sds: str, places: Sequence[tuple[str, int]]) -> None:
    """Those of these blocks of which the SDS has a copy, if they are written."""
    with hosts.client() as client:
        for volume, block in places:
            place = f"{volume}/{block // CHUNK_BLOCKS}:{block % CHUNK_BLOCKS}"
            with suppress(ConflictError, NotFoundError):
                client.post(f"/sds/{sds}/inject", corrupt=[place])


def _await_clean(hosts: Hosts, places: Sequence[tuple[str, int]]) -> None:
    """Has the chunks verified and repaired: a bad block that nobody reads would wait for the day when it is needed."""

    def clean(volume: str, chunk: int) -> None:
        deadline = time.monotonic() + CLEAN_AGAIN_SECONDS
        words: dict[str, Any] = {"first": chunk, "count": 1, "repair": True}
        while (report := _ordered(hosts, f"/vol/{volume}/verify", **words))["problem_count"]:
            if time.monotonic() > deadline:
                raise HostsError(f"{volume} is not repaired within {CLEAN_AGAIN_SECONDS:.0f} s: {report['problems']}")
            time.sleep(ANSWER_AGAIN_SECONDS)

    chunks = sorted({(volume, block // CHUNK_BLOCKS) for volume, block in places})
    with ThreadPoolExecutor(CORRUPTED_BLOCKS) as threads:
        list(threads.map(clean, *zip(*chunks, strict=True)))


# -- what there is to do


def _outage_seconds(rng: random.Random) -> float:
    if rng.random() < LONG_OUTAGE:
        return rng.uniform(*LONG_OUTAGE_SECONDS)
    return min(6.0, rng.expovariate(1 / OUTAGE_SECONDS_MEAN))


def _freeze_seconds(rng: random.Random) -> float:
    """0.1 to 10 s, more often short."""
    return float(10 ** rng.triangular(-1, 1, -1))


def _disk_seconds(rng: random.Random) -> float:
    return rng.uniform(0.3, 2.5)


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


def _fail_sds(rng: random.Random, shape: Shape) -> Fault:
    return Fault("fail-sds", (rng.choice(shape.servers),), max(0.1, _outage_seconds(rng)))


def _slow_disk(rng: random.Random, shape: Shape) -> Fault:
    delays = [f"pwrite={rng.randint(1, 10)}ms", f"pread={rng.randint(1, 40)}ms", f"fdatasync={rng.randint(1, 300)}ms"]
    orders = (("delays", rng.sample(delays, rng.randint(1, 3))),)
    return Fault("slow-disk", (rng.choice(shape.servers),), _disk_seconds(rng), orders=orders)


def _eio(rng: random.Random, shape: Shape) -> Fault:
    """Reads most of the time: an error of a write or sync takes the whole device out of service."""
    call, percent_max = rng.choice([("pread", 30.0), ("pread", 30.0), ("pwrite", 1.0), ("fdatasync", 50.0)])
    orders = (("errors", [f"{call}=EIO@{rng.uniform(0.01, 1.0) * percent_max:.3f}%"]),)
    return Fault("eio", (rng.choice(shape.servers),), _disk_seconds(rng), orders=orders)


def _full_disk(rng: random.Random, shape: Shape) -> Fault:
    return Fault("full-disk", (rng.choice(shape.servers),), _disk_seconds(rng), orders=(("full", True),))


def _corrupt_blocks(rng: random.Random, shape: Shape) -> Fault:
    blocks = blocks_of(0, VOLUME_BYTES // BLOCK_BYTES, Pattern.blocks)
    places = tuple((rng.choice(VOLUMES), rng.choice(blocks)) for _ in range(CORRUPTED_BLOCKS))
    return Fault("corrupt", (rng.choice(shape.servers),), rng.uniform(0.1, 0.6), places=places)


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
    "fail-sds": (4, _fail_sds),
    "slow-disk": (2, _slow_disk),
    "eio": (4, _eio),
    "full-disk": (2, _full_disk),
    "corrupt": (4, _corrupt_blocks),
}
DISKS = ("eio", "full-disk", "corrupt")  # of one SDS each: copies are lost by them
WITH_DISKS = ("kill-mdm", "freeze-mdm")  # what may come on top


def draw(rng: random.Random, shape: Shape, kinds: Sequence[str]) -> list[Fault]:
    """The next faults, of which each but the first comes while the one before it lasts."""
    number = rng.choices([*GROUP_SIZES], [*GROUP_SIZES.values()])[0]
    group: list[Fault] = []
    while len(group) < number:
        able = list(kinds)
        if any(fault.kind in DISKS for fault in group):
            able = [kind for kind in kinds if kind in WITH_DISKS]
        elif group:
            able = [kind for kind in kinds if kind not in DISKS]
        if not able:
            break
        (kind,) = rng.choices(able, [KINDS[one][0] for one in able])
        group.append(KINDS[kind][1](rng, shape))
    # What needs the MDM comes before it may be away, and one SDS is not ordered about twice.
    group.sort(key=lambda fault: not fault.is_ordered)
    ordered = [fault.hosts for fault in group if fault.is_ordered]
    return [fault for at, fault in enumerate(group) if not fault.is_ordered or fault.hosts not in ordered[:at]]


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
        killed = {host for fault in self.faults if _ends_engine(fault.kind) for host in fault.hosts if host != MDM}
        cut = any(fault.kind.startswith("cut") for fault in self.faults)
        return bool(killed) and (cut or len(disturbed) > 1)


def _ends_engine(kind: str) -> bool:
    return kind.startswith(("kill", "fail"))


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
    begun: float = field(default_factory=time.monotonic)

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
                self._await_health()
                group = draw(self.rng, self.hosts.shape, self.kinds)
                if any(fault.kind in DISKS for fault in group):
                    self._await_settled()
                self._fault(group)
            self.growth.look()
            ended = time.monotonic()
        self._measure(self.happened[first:], logs, ended)
        forgetful = [(one.begun, one.recovered) for one in self.happened[first:] if one.is_forgetful]
        seen = self.load.judge([*logs.values(), *self.load.read_back()], forgetful)
        if self.load.problems:
            return
        stall = max((max(one.stalls.values()) for one in self.happened[first:]), default=0.0)
        print(
            f"round {number}: {sum(len(one.faults) for one in self.happened[first:])} faults in "
            f"{len(self.happened) - first} groups, longest stall {stall:.2f} s; {len(seen.ended)} blocks read and "
            f"written, all as they must be; so far {self.faults} faults, {self.pace:.0f} an hour",
            flush=True,
        )

    @property
    def faults(self) -> int:
        return sum(len(one.faults) for one in self.happened)

    @property
    def pace(self) -> float:
        """Faults an hour, with all that is done beside them."""
        return self.faults / max(time.monotonic() - self.begun, 1.0) * 3600

    def _fault(self, faults: list[Fault]) -> None:
        """From the first fault to health that is OK. All is undone, whatever happens."""
        one = Happened(faults, time.monotonic())
        self.happened.append(one)
        last = {id(fault): fault for fault in faults}
        try:
            for at, _, undone, fault in schedule(faults, self.rng):
                time.sleep(max(0.0, one.begun + at - time.monotonic()))
                if undone:
                    fault.undo(self.hosts)
                    del last[id(fault)]
                else:
                    fault.inject(self.hosts)
                    self.journal.write("fault", number=len(self.happened), **fault.document())
        finally:
            self._undo_all([*last.values()])
        # A later one may have killed what an earlier one had undone.
        self.hosts.start(*self.hosts.shape.nodes)
        seconds = self._await_health()
        one.recovered = time.monotonic()
        self.journal.write("recovered", number=len(self.happened), after_seconds=round(seconds, 3))

    def _await_health(self) -> float:
        """The seconds it took. An error of a disk may have taken devices out of service, also some that the MDM hears
        of only now: an operator's order brings them back."""
        begun = time.monotonic()
        while (health := self.hosts.health()) != "OK":
            if time.monotonic() > begun + HEALTH_SECONDS:
                raise HostsError(f"after {HEALTH_SECONDS:.0f} s health is {health}")
            with suppress(Error), self.hosts.client() as client:
                for sds in self.hosts.shape.servers:
                    if client.get(f"/sds/{sds}")["failed_devices"]:
                        client.post(f"/sds/{sds}/recover")
            time.sleep(ANSWER_AGAIN_SECONDS)
        return time.monotonic() - begun

    def _await_settled(self) -> None:
        """All has been well for a while: where a disk errs that has the only copy, IO fails as it should."""
        since = time.monotonic()
        while time.monotonic() < since + SETTLED_SECONDS:
            if self.hosts.health() != "OK":
                self._await_health()
                since = time.monotonic()
            time.sleep(ANSWER_AGAIN_SECONDS)

    def _undo_all(self, faults: Sequence[Fault]) -> None:
        """Of a run that is broken off: processes and links first."""
        for fault in sorted(faults, key=lambda fault: fault.is_ordered):
            with suppress(HostsError, Error):
                fault.undo(self.hosts)

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
        self._await_health()
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
            self._await_health()
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


def schedule(faults: Sequence[Fault], rng: random.Random) -> list[tuple[float, int, bool, Fault]]:
    """When each is brought about and undone (seconds from the first, a number, whether it is the undoing).

    What an SDS was ordered is taken back last: before that the SDS, the MDM or the way between them may be away.
    """
    moments, begins = [], 0.0
    for number, fault in enumerate(faults):
        moments.append((begins, number, False, fault))
        moments.append((begins + fault.seconds, number, True, fault))
        if not (fault.is_ordered and number + 1 < len(faults) and faults[number + 1].is_ordered):
            begins += fault.seconds * rng.random()
    last = max(at for at, *_ in moments)
    return sorted(
        (last + 0.001 if undone and fault.is_ordered else at, number, undone, fault)
        for at, number, undone, fault in moments
    )


def soak(hosts: Hosts, arguments: argparse.Namespace, journal: Journal) -> list[str]:
    """The whole run; what was not as it must be."""
    pattern = Pattern(rate=arguments.rate)
    load, until = Load(hosts, VOLUMES, pattern), time.monotonic() + arguments.minutes * 60
    run = Soak(hosts, random.Random(arguments.seed), arguments.kinds, journal, load, Growth(hosts))
    number = 0
    with told(load.problems):
        run.begin()
        while not load.problems and time.monotonic() < until and len(run.happened) < arguments.faults:
            number += 1
            run.round(number, min(ROUND_GROUPS, arguments.faults - len(run.happened)), until)
        if not load.problems:
            run.end()
        if not load.problems and not arguments.quick:
            run.read_each_copy()
    run.print_table()
    faults, pace = run.faults, round(run.pace)
    print(
        f"{faults} faults in {len(run.happened)} groups ({pace} an hour), "
        f"{load.operations} blocks read and written, {load.errors} IO errors, "
        f"{load.again} unanswered writes carried out again after both servers had restarted",
        flush=True,
    )
    for line in load.evidence:
        journal.write("seen", operation=line)
    counts = {
        "faults": faults,
        "faults_an_hour": pace,
        "operations": load.operations,
        "errors": load.errors,
        "again": load.again,
    }
    journal.write("verdict", **counts, problems=load.problems)
    if load.problems:
        print(logs_of(hosts))
    return load.problems


def main() -> int:
    parser = argparse.ArgumentParser(description="Random faults under load: is anything lost, stale or refused?")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--faults", type=int, default=1_000_000, help="groups of them, at most")
    parser.add_argument("--kinds", type=_kinds, help=f"comma-separated, of {','.join(KINDS)}")
    parser.add_argument("--sds", type=int, default=4)
    parser.add_argument("--sdcs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=600, help="IOs a second of each mount")
    parser.add_argument("--journal", type=Path, default=Path("soak.journal.jsonl"))
    parser.add_argument("--quick", action="store_true", help="do not read each copy alone in the end")
    add_options(parser, "soak")
    arguments = parser.parse_args()
    able = [kind for kind in KINDS if arguments.namespaces or not kind.startswith("cut")]
    arguments.kinds = arguments.kinds or able
    if wrong := sorted(set(arguments.kinds) - set(able)):
        parser.error(f"{', '.join(wrong)} needs --namespaces")
    print(f"seed {arguments.seed}; journal: {arguments.journal}", flush=True)
    with arguments.journal.open("w") as file:
        journal = Journal(file)
        journal.write("begun", seed=arguments.seed, kinds=arguments.kinds, minutes=arguments.minutes)
        shape = Shape(sds=arguments.sds, sdcs=arguments.sdcs)
        problems = on_hosts(arguments, shape, lambda hosts: soak(hosts, arguments, journal))
    return verdict(problems, "passed: nothing lost, nothing stale, no IO failed")


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"no kind {wrong[0]}: there are {', '.join(KINDS)}")
    return kinds


if __name__ == "__main__":
    sys.exit(main())
