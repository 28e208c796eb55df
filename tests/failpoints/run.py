"""The MDM killed (SIGKILL) at each boundary in turn while the sets of copies change: is all consistent afterwards?

    python -m tests.failpoints.run                               (make failpoints: every boundary of every operation)
    python -m tests.failpoints.run --only shrink --from 10       from the tenth on
    python -m tests.failpoints.run --at "shrink:after commit LeaveOut" ...      only at these, by their names

Real nodes on addresses of the loopback, a mount, and programs that write and read it. A step: an operation begins; the
MDM kills itself at boundary N (``node``) and is started again; the operation comes to its end. Then

- no IO has failed, every block reads as a register would (``tools.soak.history``), also after the step;
- the database that the killed process left is one that the MDM opens (its invariants are checked there), and no version
  of the map was said to anybody that is not in it;
- health is OK, every chunk has two copies in sync, and ``vol verify`` finds nothing.

N goes up by one until an operation ends without coming to its boundary N. The cluster is the same for all steps: what
one spoils, a later one finds.
"""

from __future__ import annotations

import argparse
import math
import random
import secrets
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mdm.store.sqlite import SqliteStore
from pfvol import childprocess
from pfvol.client import Client
from pfvol.errors import Error
from tests.failpoints.node import BOUNDARIES, KILL_AT
from tests.support.waiting import poll_until
from tools.demo import hosts as demo
from tools.demo.hosts import MDM, PD, POOL, Hosts, HostsError, Shape
from tools.soak.load import Load, Pattern, logs_of, two_copies
from tools.soak.world import SoakError

T = TypeVar("T")

MIB = 1024**2
VOLUMES = {"a": 16 * MIB, "b": 16 * MIB}
SDC = "sdc1"
SETTLED_SECONDS = 2.5
SHAPE = Shape(sds=3, sdcs=1, sds_bytes=320 * MIB)
PATTERN = Pattern(blocks=200, threads=4, rate=300, writes=0.5)
STEP_SECONDS = 60.0
MORE_SECONDS = 0.8  # after the end of an operation the MDM may have something to say of it
STEPS_MAX = 500
DELAY_SECONDS = 10  # of the rebuild: longer than a step keeps an SDS away


def wait(condition: Callable[[], T], what: str) -> T:
    try:
        return poll_until(condition, STEP_SECONDS, what)
    except AssertionError as error:
        raise SoakError(str(error)) from None


class SteppedHosts(Hosts):
    program = "tests.failpoints.node"


class World:
    """The cluster, and what an operation may want to know of it."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts

    def client(self) -> Client:
        return self.hosts.client(timeout_seconds=5.0)

    def members(self, volume: str = "a") -> list[list[str]]:
        """Per chunk the SDSs of its set, the primary first."""
        with self.client() as client:
            chunks = client.get(f"/vol/{volume}/chunks")
        return [[copy["sds_name"] for copy in chunk["replicas"] if not copy["is_rebuilding"]] for chunk in chunks]

    def is_out(self, sds: str) -> bool:
        """Whether no set has it."""
        return not any(sds in members for volume in VOLUMES for members in self.members(volume))

    def pairs(self) -> bool:
        return all(len(members) == 2 for volume in VOLUMES for members in self.members(volume))

    def sds(self, name: str) -> dict[str, Any]:
        with self.client() as client:
            return dict(client.get(f"/sds/{name}"))

    def names(self) -> list[str]:
        with self.client() as client:
            return [sds["name"] for sds in client.get("/sds/list")]

    def set_delay(self, seconds: int) -> None:
        with self.client() as client:
            client.patch(f"/pool/{POOL}", rebuild_delay_seconds=seconds)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """While the MDM does not answer nothing is true."""

        def holds() -> bool:
            with suppress(Error):
                return condition()
            return False

        wait(holds, what)

    def is_well(self) -> bool:
        return self.hosts.health() == "OK" and self.pairs()

    def settle(self) -> None:
        """Until it has been well for a while: of a server that was away the others may tell after it is back."""
        since = math.inf

        def settled() -> bool:
            nonlocal since
            since = min(since, time.monotonic()) if self.is_well() else math.inf
            return time.monotonic() - since >= SETTLED_SECONDS

        self.wait(settled, f"health is OK and every chunk has two copies: {self.hosts.health()}")


class Operation(ABC):
    """``prepare``, then ``begin`` and ``is_done`` with the MDM's boundaries counted, then ``finish``."""

    name = ""

    def __init__(self, world: World) -> None:
        self.world = world
        self.hosts = world.hosts
        self.sds = ""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """Before boundaries are counted."""

    @abstractmethod
    def begin(self) -> None: ...

    @abstractmethod
    def is_done(self) -> bool: ...

    def finish(self) -> None:
        self.hosts.start(self.sds)


class Shrink(Operation):
    """The secondary dies under writes."""

    name = "shrink"
    index = -1

    def prepare(self) -> None:
        self.sds = self.world.members()[0][self.index]

    def begin(self) -> None:
        self.hosts.kill(self.sds)

    def is_done(self) -> bool:
        return self.world.is_out(self.sds) and self.world.sds(self.sds)["state"] == "DOWN"


class Promote(Shrink):
    """The primary dies under writes."""

    name = "promote"
    index = 0


class Rejoin(Operation):
    """Who was away comes back, learns what it lacks and joins the sets."""

    name = "rejoin"

    def prepare(self) -> None:
        self.sds = random.choice(self.world.members()[0])
        self.hosts.kill(self.sds)
        self.world.wait(lambda: self.world.is_out(self.sds), f"{self.sds} is left out")

    def begin(self) -> None:
        self.hosts.start(self.sds)

    def is_done(self) -> bool:
        return self.world.is_well()


class Rebuild(Operation):
    """An SDS stays away: its copies are made elsewhere."""

    name = "rebuild"

    def prepare(self) -> None:
        self.world.set_delay(0)
        self.sds = self.world.members()[0][-1]

    def begin(self) -> None:
        self.hosts.kill(self.sds)

    def is_done(self) -> bool:
        return self.world.is_out(self.sds) and self.world.pairs()

    def finish(self) -> None:
        self.world.wait(self.is_done, "what the dead SDS had is elsewhere")
        self.world.set_delay(DELAY_SECONDS)
        super().finish()


class Withdraw(Operation):
    """The disks of one that serves fail."""

    name = "withdraw"

    def prepare(self) -> None:
        self.sds = self.world.members()[0][0]

    def begin(self) -> None:
        process = self.hosts.process(self.sds)
        if process is None:
            raise SoakError(f"{self.sds} does not run")
        childprocess.send_signal(process, signal.SIGUSR1)

    def is_done(self) -> bool:
        return self.world.is_out(self.sds) and self.world.pairs()

    def finish(self) -> None:
        self.world.wait(self.is_done, "what the failed disks had is elsewhere")
        self.hosts.kill(self.sds)
        super().finish()


class Remove(Operation):
    """An SDS is emptied and goes; a new one comes in its place."""

    name = "remove"

    def prepare(self) -> None:
        self.sds = self.world.members()[0][0]

    def begin(self) -> None:
        with suppress(Error), self.world.client() as client:  # The MDM may die before it answers.
            client.delete(f"/sds/{self.sds}")

    def is_done(self) -> bool:
        return self.sds not in self.world.names()

    def finish(self) -> None:
        self.world.wait(self._is_gone, f"{self.sds} is removed")
        self.hosts.kill(self.sds)  # It has been told to end; not if the MDM died in between.
        data = self.hosts.directory(self.sds) / self.sds
        shutil.rmtree(data)
        data.mkdir(mode=0o700)
        self.hosts.start(self.sds)
        with self.world.client() as client:
            client.post("/sds/add", pd_id=PD, name=self.sds, node=self.sds, capacity_bytes=SHAPE.sds_bytes)
        self.hosts.await_servers()

    def _is_gone(self) -> bool:
        """An MDM that died before it kept the request has never heard it."""
        if self.is_done():
            return True
        if not self.world.sds(self.sds)["removing"]:
            self.begin()
        return False


OPERATIONS = {one.name: one for one in (Shrink, Promote, Rejoin, Rebuild, Withdraw, Remove)}


@dataclass
class Stepped:
    """What came of an operation's steps: the boundaries at which the MDM was killed, in order."""

    killed_at: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0


class Failpoints:
    """Steps operations on one cluster."""

    def __init__(self, hosts: Hosts, rng: random.Random) -> None:
        self.hosts = hosts
        self.world = World(hosts)
        self.rng = rng
        self.load = Load(hosts, list(VOLUMES), PATTERN)

    @property
    def _kill_at(self) -> Path:
        return self.hosts.directory(MDM) / KILL_AT

    @property
    def _boundaries(self) -> list[str]:
        return (self.hosts.directory(MDM) / BOUNDARIES).read_text().splitlines()

    def begin(self) -> None:
        self.hosts.begin()
        for volume, size_bytes in VOLUMES.items():
            self.hosts.volume(volume, size_bytes, [SDC])
        self.hosts.mount(SDC, "direct")
        self.world.set_delay(DELAY_SECONDS)
        self.world.wait(self.world.is_well, "health is OK")

    def step(self, kind: type[Operation], wanted: str | int) -> tuple[str | None, list[str], float]:
        """At which boundary the MDM was killed (None: the operation ended before), what was wrong then, and how long
        no IO came back at most."""
        operation = kind(self.world)
        operation.prepare()
        with self.load.running(self.rng.randrange(2**31)) as logs:
            begun = time.monotonic()
            number = len(self._boundaries) + wanted if isinstance(wanted, int) else wanted
            self._kill_at.write_text(str(number))
            operation.begin()
            killed_at = self._run_to(operation)
            self._kill_at.unlink()
            problems = []
            if killed_at is not None:
                problems = self._look_at_database()
                self.hosts.start(MDM)
                self.hosts.await_answer()
            operation.finish()
            self.world.settle()
            ended = time.monotonic()
        seen = self.load.judge([*logs.values(), *self.load.read_back()])
        problems += self.load.problems + self.load.evidence + two_copies(self.hosts, list(VOLUMES))
        self.load.problems, self.load.evidence = [], []
        return killed_at, problems, seen.longest_stall(begun, ended)

    def _run_to(self, operation: Operation) -> str | None:
        """Until the MDM has killed itself, or the operation is done and nothing more comes of it."""
        not_done_at = time.monotonic()

        def ended() -> str:
            nonlocal not_done_at
            if self.hosts.process(MDM) is None:
                return "killed"
            done = False
            with suppress(Error):
                done = operation.is_done()
            if not done:
                not_done_at = time.monotonic()
            return "done" if time.monotonic() - not_done_at > MORE_SECONDS else ""

        if wait(ended, f"{operation.name} ends, or the MDM comes to its boundary") == "done":
            return None
        return self._boundaries[-1].split("\t")[0]

    def _look_at_database(self) -> list[str]:
        """As a new MDM will find it."""
        said = int(self._boundaries[-1].split("\t")[1])
        copy = self.hosts.base / "database"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for path in (self.hosts.directory(MDM) / MDM).glob("mdm.sqlite*"):
            shutil.copy(path, copy)
        try:
            store = SqliteStore.open(copy / "mdm.sqlite")
            try:
                state = store.load()
            finally:
                store.close()
        except Error as error:
            return [f"the database cannot be used: {error}"]
        if state.map_version < said:
            return [f"version {said} of the map was said, the database has {state.map_version}"]
        return []


def steps_of(arguments: argparse.Namespace) -> Iterator[tuple[str, list[str | int]]]:
    if arguments.at:
        for place in arguments.at:
            operation, _, name = place.partition(":")
            yield operation, [name]
        return
    for name in arguments.only.split(",") if arguments.only else OPERATIONS:
        yield name, list(range(arguments.first, STEPS_MAX, arguments.every))


def run(failpoints: Failpoints, arguments: argparse.Namespace) -> bool:
    """True when nothing was wrong. Ends with the first step that was not all right: the cluster shows what it was."""
    total, started = 0, time.monotonic()
    failpoints.begin()
    for name, wanted in steps_of(arguments):
        stepped = Stepped()
        for one in wanted:
            begun = time.monotonic()
            killed_at, stepped.problems, stall = failpoints.step(OPERATIONS[name], one)
            stepped.slowest_seconds = max(stepped.slowest_seconds, stall)
            if killed_at is not None:
                stepped.killed_at.append(killed_at)
            if arguments.verbose or stepped.problems:
                where = killed_at or "it ended"
                print(
                    f"  {name} {one}: {where}, {stall:.1f} s without IO, {time.monotonic() - begun:.1f} s", flush=True
                )
            if stepped.problems:
                print("\n".join(f"  WRONG: {problem}" for problem in stepped.problems), flush=True)
                return False
            if killed_at is None:
                break
        if arguments.at and not stepped.killed_at:
            print(f"  WRONG: {name} never came to {wanted[0]!r}")
            return False
        total += len(stepped.killed_at)
        kinds = sorted({at.partition(" to ")[0] for at in stepped.killed_at})
        longest = f"at most {stepped.slowest_seconds:.1f} s without IO"
        print(
            f"{name}: the MDM killed at {len(stepped.killed_at)} boundaries, {longest}: {'; '.join(kinds)}", flush=True
        )
    load, seconds = failpoints.load, time.monotonic() - started
    again = f", {load.again} writes carried out again" if load.again else ""
    print(f"passed: {total} boundaries, {load.operations} block operations judged{again}, {seconds:.0f} s")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="The MDM killed at each boundary of what it does.")
    parser.add_argument("--only", default="", help=f"of {', '.join(OPERATIONS)}; separated by commas")
    parser.add_argument("--from", dest="first", type=int, default=1, help="the number of the first boundary")
    parser.add_argument("--every", type=int, default=1, help="each n-th of them")
    parser.add_argument("--at", nargs="+", help="OPERATION:NAME of a boundary, or how it begins")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--name", default=f"fp{secrets.token_hex(3)}", help="of the hosts (tools.demo.hosts)")
    parser.add_argument("--keep", action="store_true", help="leave a cluster that failed as it is")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    random.seed(arguments.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    good = False
    hosts = SteppedHosts.make(arguments.name, SHAPE, loopback=True)
    try:
        good = run(Failpoints(hosts, random.Random(arguments.seed)), arguments)
    except (SoakError, HostsError, Error, OSError) as error:
        print(f"FAILED: {error}\n{logs_of(hosts)}")
    finally:
        if arguments.keep and not good:
            print(f"left as it is: python -m tools.demo.hosts --name {arguments.name} clean")
        else:
            demo.clean(arguments.name)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
