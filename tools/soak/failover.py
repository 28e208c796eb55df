"""How long IO stands still when a server dies or hangs, measured again and again; and whether any IO fails.

    python -m tools.soak.failover --kills 50        (make failover KILLS=50)

1. *killed*: fio reads and writes a mounted volume at random, 4 KiB, 32 at a time, every block verified; SIGKILL goes to
   a random SDS, which is started again a moment later; then health has to become OK. The stall is the longest time in
   which no IO of fio came back.
2. *hangs*: four threads write 4 KiB blocks as fast as they can; a random SDS is stopped (SIGSTOP) for a while.
3. *mdm*: the same load, and the MDM is killed and stays away for a while.

In the end all chunks must have two copies in sync, and ``vol verify`` has to be clean. Ends with 1 if anything was not
so, if an IO failed, or if a stall was longer than it may be.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from tools.demo.hosts import MDM, Hosts, Shape
from tools.soak.hosted import add_options, on_hosts, report
from tools.soak.load import Load, Pattern, two_copies
from tools.soak.world import SoakError

MIB = 1024**2
FIO_VOLUME, WRITERS_VOLUME = "fio", "writers"
VOLUME_BYTES = 256 * MIB
CLIENT = "sdc1"
LOAD_SECONDS = (0.7, 1.5)  # from the first IO to the fault
AWAY_SECONDS = (0.5, 3.0)  # a server that was killed
HEALTH_SECONDS = 90.0
COMMAND_SECONDS = 120.0
FIO_START_SECONDS = 0.5
POLL_SECONDS = 0.02
FIO = ["fio", "--name=fio", "--rw=randrw", "--bs=4k", "--iodepth=32", "--ioengine=libaio", "--direct=1", "--size=128m"]
FIO += ["--runtime=600", "--time_based", "--randrepeat=0", "--output-format=json"]
FIO += ["--verify=crc32c", "--verify_backlog=1024", "--verify_fatal=1"]
# A line for each IO: when it came back, by the clock of the day in milliseconds, and how long it took.
FIO += ["--log_unix_epoch=1", "--disable_clat=1", "--disable_slat=1"]
ROW = "{:8} {:>6} {:>16} {:>9} {:>20} {:>10}"


@dataclass(frozen=True)
class Measured:
    """One fault and what came of it."""

    fault: str
    host: str
    before_seconds: float  # the longest stall of the same load before the fault: what the machine does by itself
    stall_seconds: float
    slowest_io_seconds: float
    recovered_seconds: float  # from the moment the server was there again until health was OK
    ios: int


def longest_gap(moments: Iterable[float]) -> float:
    """Between two that follow each other."""
    return max((later - earlier for earlier, later in pairwise(sorted(moments))), default=0.0)


@dataclass
class Failover:
    """A cluster with a mount on which faults are measured."""

    hosts: Hosts
    rng: random.Random
    load: Load

    def begin(self) -> None:
        for volume in (FIO_VOLUME, WRITERS_VOLUME):
            self.hosts.volume(volume, VOLUME_BYTES, [CLIENT])
        self.hosts.mount(CLIENT, "direct")
        self.hosts.await_health(HEALTH_SECONDS)

    def killed(self) -> Measured:
        """SIGKILL of an SDS under fio."""
        sds, log = self.rng.choice(self.hosts.shape.servers), self.hosts.base / "fio_lat.1.log"
        argv = [*FIO, f"--filename={self.hosts.mountpoint(CLIENT) / FIO_VOLUME}"]
        argv += [f"--write_lat_log={self.hosts.base / 'fio'}", f"--randseed={self.rng.randrange(2**31)}"]
        begins = self.hosts.base / "fio.begins"
        begins.unlink(missing_ok=True)
        argv += [f"--exec_prerun=touch {begins}"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=log.parent) as fio:
            try:
                await_file(begins, COMMAND_SECONDS)
                time.sleep(FIO_START_SECONDS + self.rng.uniform(*LOAD_SECONDS))
                begun = time.time()
                self.hosts.kill(sds)
                time.sleep(self.rng.uniform(*AWAY_SECONDS))
                self.hosts.start(sds)
                recovered = self.hosts.await_health(HEALTH_SECONDS)
                fio.terminate()
                said, errors = fio.communicate(timeout=COMMAND_SECONDS)
            finally:
                fio.kill()
        check_fio(said, errors)
        rows = [line.split(",") for line in log.read_text().splitlines()]
        ended = [int(row[0]) / 1000 for row in rows]
        if not ended or min(ended) > begun - LOAD_SECONDS[0] / 2:
            raise SoakError("fio had not begun when the server was killed: the machine is too busy to measure anything")
        slowest = max(int(row[1]) for row in rows) / 1e9
        before, stall = longest_gap(at for at in ended if at < begun), longest_gap(ended)
        return Measured("killed", sds, before, stall, slowest, recovered, len(rows))

    def writers(self, fault: str, seconds: float) -> Measured:
        """``hangs``: SIGSTOP of an SDS for so long; ``mdm``: the MDM is killed for so long."""
        host = MDM if fault == "mdm" else self.rng.choice(self.hosts.shape.servers)
        with self.load.running(self.rng.randrange(2**31)) as logs:
            started = time.monotonic()
            time.sleep(self.rng.uniform(*LOAD_SECONDS))
            begun = time.monotonic()
            if fault == "mdm":
                self.hosts.kill(host)
            else:
                self.hosts.freeze(host)
            try:
                time.sleep(seconds)
            finally:
                self.hosts.start(host)
                self.hosts.thaw(host)
            recovered = self.hosts.await_health(HEALTH_SECONDS)
            ended = time.monotonic()
        seen = self.load.judge([*logs.values(), *self.load.read_back()])
        if self.load.problems:
            raise SoakError("\n".join(self.load.problems))
        before, stall = seen.longest_stall(started, begun), seen.longest_stall(begun, ended)
        return Measured(fault, host, before, stall, seen.slowest(begun, ended), recovered, len(seen.ended))


def await_file(path: Path, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise SoakError(f"fio does not begin within {timeout_seconds:.0f} s")
        time.sleep(POLL_SECONDS)


def check_fio(said: str, errors: str) -> None:
    """It was told to end, so its exit code says nothing; its own count of errors does."""
    try:
        jobs = json.loads(said[said.index("{") : said.rindex("}") + 1])["jobs"]
    except ValueError as error:
        raise SoakError(f"fio said nothing that can be read: {said}{errors}") from error
    if any(job["error"] for job in jobs) or "verify:" in errors:
        raise SoakError(f"an IO of fio failed: {errors.strip() or jobs[0]['error']}")


def table(measured: Sequence[Measured]) -> list[str]:
    lines = [ROW.format("fault", "times", "stall s: median", "worst", "OK again s: median", "worst")]
    for fault in dict.fromkeys(one.fault for one in measured):
        stalls = [one.stall_seconds for one in measured if one.fault == fault]
        recovered = [one.recovered_seconds for one in measured if one.fault == fault]
        figures = [statistics.median(stalls), max(stalls), statistics.median(recovered), max(recovered)]
        lines.append(ROW.format(fault, len(stalls), *(f"{figure:.2f}" for figure in figures)))
    return lines


def problems(measured: Sequence[Measured], arguments: argparse.Namespace) -> list[str]:
    """Which stalls were longer than they may be."""
    found = []
    killed = [one.stall_seconds for one in measured if one.fault == "killed"]
    if killed and statistics.median(killed) > arguments.median_max:
        found.append(f"the median stall of a kill is {statistics.median(killed):.2f} s, over {arguments.median_max} s")
    for one in measured:
        limit = arguments.mdm_stall_max if one.fault == "mdm" else arguments.stall_max
        if one.stall_seconds > limit:
            found.append(f"{one.host} {one.fault}: IO stood still for {one.stall_seconds:.2f} s, over {limit} s")
    return found


def run(hosts: Hosts, arguments: argparse.Namespace, measured: list[Measured]) -> list[str]:
    load = Load(hosts, [WRITERS_VOLUME], Pattern(blocks=8000, threads=4, rate=0, writes=1.0))
    failover = Failover(hosts, random.Random(arguments.seed), load)
    failover.begin()
    for number in range(1, arguments.kills + 1):
        measured.append(failover.killed())
        print(f"kill {number}: {describe(measured[-1])}", flush=True)
    for number in range(1, arguments.hangs + 1):
        measured.append(failover.writers("hangs", arguments.hang_seconds))
        print(f"hang {number}: {describe(measured[-1])}", flush=True)
    if arguments.mdm_seconds:
        measured.append(failover.writers("mdm", arguments.mdm_seconds))
        print(f"MDM away for {arguments.mdm_seconds:g} s: {describe(measured[-1])}", flush=True)
    return problems(measured, arguments) + two_copies(hosts, [FIO_VOLUME, WRITERS_VOLUME])


def describe(one: Measured) -> str:
    return (
        f"{one.host}: no IO for {one.stall_seconds:.2f} s (before the fault {one.before_seconds:.2f} s), "
        f"the slowest took {one.slowest_io_seconds:.2f} s, "
        f"health OK {one.recovered_seconds:.2f} s after it was back, {one.ios} IOs"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="How long does IO stand still when a server dies or hangs?")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--hangs", type=int, default=5)
    parser.add_argument("--hang-seconds", type=float, default=15.0)
    parser.add_argument("--mdm-seconds", type=float, default=60.0, help="that the MDM stays away; 0: not at all")
    parser.add_argument("--median-max", type=float, default=1.0, help="seconds, of the kills' stalls")
    parser.add_argument("--stall-max", type=float, default=3.0)
    parser.add_argument("--mdm-stall-max", type=float, default=0.1)
    parser.add_argument("--sds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("failover.results.json"))
    add_options(parser, "failover")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    measured: list[Measured] = []
    shape = Shape(sds=arguments.sds, sdcs=1)
    found = on_hosts(arguments, shape, lambda hosts: run(hosts, arguments, measured))
    return report(arguments, found, {"measured": [asdict(one) for one in measured]}, table(measured))


if __name__ == "__main__":
    sys.exit(main())
