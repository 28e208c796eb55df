"""Memory and file descriptors of every process of a cluster under load: small when idle, and flat.

    python -m tools.soak.memory --minutes 10        (make memory MINUTES=10)

First everything is idle, and a storage server may have 80 MB resident, a mount 100 MB. Then fio reads and writes at
random in 4 KiB blocks, 32 at a time, and in sequence in 1 MiB blocks, both on one volume for MINUTES. Every 5 s it
looks at ``VmRSS``, the proportional share (PSS) and the open descriptors of each process. After the warm-up none may
grow by 5 MB, or by more descriptors than come and go. A table and, in a file, every sample say how it went.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.soak.world import SoakError, World

MB = 10**6
VOLUME = "memory"
SHAPE = ("--sds", "3")
SAMPLE_SECONDS = 5.0
IDLE_SECONDS = 10.0
GROWTH_MAX = {"rss_bytes": 5 * MB, "pss_bytes": 5 * MB, "descriptors": 4}  # connections to the API come and go
IDLE_BYTES_MAX = {"sds": 80 * MB, "mount": 100 * MB}
COMPARED_SAMPLES = 6  # at either end: one sample may catch a process at something
RANDOM = ("--rw=randrw", "--bs=4k", "--iodepth=32", "--offset=0", "--size=50%")
SEQUENTIAL = ("--rw=rw", "--bs=1m", "--iodepth=4", "--offset=50%", "--size=50%", "--rate=100m")


@dataclass(frozen=True)
class Sample:
    """One process at one moment; ``at_seconds`` since the load began, negative while idle."""

    name: str
    at_seconds: float
    rss_bytes: int
    pss_bytes: int
    descriptors: int


def look(name: str, pid: int, at_seconds: float) -> Sample:
    proc = Path("/proc", str(pid))
    rss = _kib(proc / "status", "VmRSS:")
    return Sample(name, at_seconds, rss, _kib(proc / "smaps_rollup", "Pss:"), len(os.listdir(proc / "fd")))


def _kib(path: Path, field: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SoakError(f"{path} has no {field}")


def problems(samples: Iterable[Sample], warm_up_seconds: float) -> list[str]:
    """What is wrong with these samples, a sentence each."""
    found = []
    for name, taken in by_name(samples).items():
        idle_bytes = max((sample.rss_bytes for sample in taken if sample.at_seconds < 0), default=0)
        limit_bytes = next((limit for kind, limit in IDLE_BYTES_MAX.items() if name.startswith(kind)), sys.maxsize)
        if idle_bytes > limit_bytes:
            found.append(f"{name} is idle and has {idle_bytes / MB:.1f} MB resident, over {limit_bytes / MB:.0f} MB")
        for figure, allowed in GROWTH_MAX.items():
            grown = growth(taken, figure, warm_up_seconds)
            if grown > allowed:
                found.append(f"{name}: {figure} grew by {grown:,.0f}, and {allowed:,} is allowed")
    return found


def by_name(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.name, []).append(sample)
    return found


def growth(taken: list[Sample], figure: str, warm_up_seconds: float) -> float:
    """From the first samples after the warm-up to the last ones, by their medians; SoakError when there are too few."""
    figures = [getattr(sample, figure) for sample in taken if sample.at_seconds >= warm_up_seconds]
    if len(figures) < 2 * COMPARED_SAMPLES:
        raise SoakError(f"{len(figures)} samples after the warm-up are too few to say whether {figure} is flat")
    return float(statistics.median(figures[-COMPARED_SAMPLES:]) - statistics.median(figures[:COMPARED_SAMPLES]))


@dataclass
class Memory(World):
    """A cluster whose processes are looked at."""

    def look(self, at_seconds: float) -> list[Sample]:
        return [look(name, process.pid, at_seconds) for name, process in self.processes().items()]

    def watch(self, minutes: float) -> list[Sample]:
        """Idle for a moment, then under load."""
        time.sleep(IDLE_SECONDS)
        samples = self.look(-1.0)
        with self._load(minutes) as load:
            started = time.monotonic()
            while load.poll() is None:
                time.sleep(SAMPLE_SECONDS)
                samples += self.look(time.monotonic() - started)
            said, errors = load.communicate()
        if load.returncode:
            raise SoakError(f"fio ended with {load.returncode}\n{said}{errors}")
        for job in json.loads(said[said.index("{") :])["jobs"]:
            ways = (f"{way} {job[way]['iops']:.0f}/s {job[way]['bw_bytes'] / MB:.0f} MB/s" for way in ("read", "write"))
            print(f"fio {job['jobname']}: {', '.join(ways)}, {job['error']} errors")
        return samples

    @contextmanager
    def _load(self, minutes: float) -> Iterator[subprocess.Popen[str]]:
        argv = ["fio", f"--filename={self.mountpoint / VOLUME}", f"--runtime={minutes * 60:.0f}", "--time_based"]
        argv += ["--ioengine=libaio", "--direct=1", "--output-format=json"]
        argv += ["--name=random", *RANDOM, "--name=sequential", *SEQUENTIAL]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.base) as load:
            try:
                yield load
            finally:
                load.terminate()


def print_table(samples: Iterable[Sample], warm_up_seconds: float) -> None:
    print(f"{'':8} {'idle MB':>8} {'RSS MB: warm':>13} {'end':>7} {'PSS MB: warm':>13} {'end':>7} {'descriptors':>13}")
    for name, taken in sorted(by_name(samples).items()):
        idle = next(sample for sample in taken if sample.at_seconds < 0)
        warm = [sample for sample in taken if sample.at_seconds >= warm_up_seconds]
        first, last = warm[0], warm[-1]
        print(
            f"{name:8} {idle.rss_bytes / MB:8.1f} {first.rss_bytes / MB:13.1f} {last.rss_bytes / MB:7.1f} "
            f"{first.pss_bytes / MB:13.1f} {last.pss_bytes / MB:7.1f} {first.descriptors:8} -> {last.descriptors}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="memory and file descriptors of every process: small, and flat?")
    parser.add_argument("--minutes", type=float, default=10.0, help="of load")
    parser.add_argument("--warm-up", type=float, default=120.0, help="seconds of it that do not count")
    parser.add_argument("--output", type=Path, default=Path("memory.results.json"), help="every sample")
    arguments = parser.parse_args()
    memory = Memory(Path(tempfile.mkdtemp(prefix="pfvol-memory-")))
    try:
        memory.begin(SHAPE, [VOLUME], "1GiB")
        samples = memory.watch(arguments.minutes)
        arguments.output.write_text(json.dumps([asdict(sample) for sample in samples]) + "\n")
        found = problems(samples, arguments.warm_up)
        print_table(samples, arguments.warm_up)
        memory.end()
    except (SoakError, OSError) as error:
        print(f"FAILED: {error}\nThe cluster is left as it is in {memory.data_dir}.", flush=True)
        return 1
    shutil.rmtree(memory.base)
    print("\n".join([f"FAILED: {problem}" for problem in found]) or "passed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
