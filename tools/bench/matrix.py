"""The matrix: a fixed set of fio jobs, and buffered dd, on one file.

Owns what a row is and how it is measured. Each row is the median of several runs, with the processor time that the
whole machine spent per operation: a store that is fast because it burns the machine it serves is not fast.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 1024**2
FIO_TIMEOUT_SECONDS = 900
PATTERN_BYTES = 64 * MIB


@dataclass(frozen=True)
class FioRow:
    """One fio job. ``depth`` over 1 needs an asynchronous engine."""

    name: str
    mode: str
    block_bytes: int
    depth: int
    options: tuple[str, ...] = ()


ROWS = (
    FioRow("rr4k_q1", "randread", 4096, 1),
    FioRow("rr4k_q32", "randread", 4096, 32),
    FioRow("rw4k_q1", "randwrite", 4096, 1),
    FioRow("rw4k_q32", "randwrite", 4096, 32),
    FioRow("mix70_4k_q32", "randrw", 4096, 32, ("--rwmixread=70",)),
    FioRow("rw4k_q1_fsync", "randwrite", 4096, 1, ("--fsync=1",)),
    FioRow("sr1m_q4", "read", MIB, 4),
    FioRow("sw1m_q4", "write", MIB, 4),
)
DD_ROWS = ("dd_write", "dd_read")
ROW_NAMES = (*(row.name for row in ROWS), *DD_ROWS)


@dataclass(frozen=True)
class Measurement:
    """One row's result. ``value`` is the median of ``runs``, in ``unit`` (IOPS or MB/s, decimal)."""

    row: str
    value: float
    unit: str
    runs: list[float]
    p50_us: float | None
    p99_us: float | None
    cpu_us_per_io: float
    cpu_cores: float
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Run:
    value: float
    p50_us: float | None
    p99_us: float | None
    cpu_us_per_io: float
    cpu_cores: float


class _Busy:
    """How long the machine's processors were not idle while the block ran."""

    def __enter__(self) -> _Busy:
        self._started, self._idle_started = time.monotonic(), _idle_seconds()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.wall_seconds = time.monotonic() - self._started
        idle = _idle_seconds() - self._idle_started
        # All that is not idle, as ticks of user and system time miss what sleeps and wakes between two ticks.
        self.busy_seconds = max(0.0, (os.cpu_count() or 1) * self.wall_seconds - idle)


def _idle_seconds() -> float:
    with Path("/proc/stat").open() as stat:
        fields = [int(field) for field in stat.readline().split()[1:]]
    idle, iowait, steal = fields[3], fields[4], fields[7]
    return (idle + iowait + steal) / os.sysconf("SC_CLK_TCK")


def measure(
    file: Path,
    size_bytes: int,
    rows: list[str],
    *,
    seconds: float,
    repetitions: int,
    on_row: Callable[[Measurement], None],
) -> list[Measurement]:
    """Fills the file once, then measures ``rows`` of it in the matrix's order."""
    _fio(file, size_bytes, ["--rw=write", "--bs=1M", "--iodepth=1", "--ioengine=psync", "--direct=1", "--end_fsync=1"])
    results = []
    for row in ROWS:
        if row.name in rows:
            results.append(_measure_fio(file, size_bytes, row, seconds, repetitions))
            on_row(results[-1])
    for name in DD_ROWS:
        if name in rows:
            results.append(_measure_dd(file, size_bytes, name, repetitions))
            on_row(results[-1])
    return results


def _measure_fio(file: Path, size_bytes: int, row: FioRow, seconds: float, repetitions: int) -> Measurement:
    engine = "psync" if row.depth == 1 else _asynchronous_engine()
    arguments = [f"--rw={row.mode}", f"--bs={row.block_bytes}", f"--iodepth={row.depth}", f"--ioengine={engine}"]
    arguments += ["--direct=1", "--time_based", f"--runtime={seconds:g}", *row.options]
    runs = [_run_fio(file, size_bytes, arguments, row) for _ in range(repetitions)]
    return _median(row.name, "IOPS" if row.block_bytes < MIB else "MB/s", runs)


def _run_fio(file: Path, size_bytes: int, arguments: list[str], row: FioRow) -> _Run:
    with _Busy() as busy:
        job = _fio(file, size_bytes, arguments)
    done = [part for part in (job["read"], job["write"]) if part["total_ios"]]
    operations = sum(part["total_ios"] for part in done)
    value = sum(part["iops"] if row.block_bytes < MIB else part["bw_bytes"] / 1e6 for part in done)
    percentiles = done[0]["clat_ns"].get("percentile", {})
    return _Run(
        value,
        _microseconds(percentiles, "50.000000"),
        _microseconds(percentiles, "99.000000"),
        busy.busy_seconds * 1e6 / operations,
        busy.busy_seconds / busy.wall_seconds,
    )


def _fio(file: Path, size_bytes: int, arguments: list[str]) -> dict[str, Any]:
    argv = ["fio", "--name=row", f"--filename={file}", f"--size={size_bytes}", "--output-format=json", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=FIO_TIMEOUT_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(argv)} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}"
        )
    # fio puts its warnings in front of the document.
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"{' '.join(argv)}: IO error {job['error']} ({os.strerror(job['error'])})")
    return job


def _microseconds(percentiles: dict[str, int], key: str) -> float | None:
    return round(percentiles[key] / 1000, 1) if key in percentiles else None


def _asynchronous_engine() -> str:
    """io_uring unless the kernel refuses it, as some hosts and containers have it do."""
    with tempfile.TemporaryDirectory() as scratch:
        probe = ["fio", "--name=probe", f"--directory={scratch}", "--size=4k", "--bs=4k", "--ioengine=io_uring"]
        probed = subprocess.run(probe, capture_output=True, check=False, timeout=60)
    return "io_uring" if probed.returncode == 0 else "libaio"


def _measure_dd(file: Path, size_bytes: int, name: str, repetitions: int) -> Measurement:
    count = size_bytes // MIB
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        source = Path(scratch, "source")
        if name == "dd_write":
            pattern = os.urandom(min(PATTERN_BYTES, size_bytes))
            with source.open("wb") as out:
                for _ in range(-(-size_bytes // len(pattern))):
                    out.write(pattern)
            argv = ["dd", f"if={source}", f"of={file}", "conv=notrunc,fsync"]
        else:
            argv = ["dd", f"if={file}", "of=/dev/null"]
        runs, cold = [], True
        for _ in range(repetitions):
            cold = _drop_caches(file) and cold
            with _Busy() as busy:
                subprocess.run([*argv, "bs=1M", f"count={count}", "status=none"], check=True, capture_output=True)
            cpu_us = busy.busy_seconds * 1e6 / count
            rate = count * MIB / 1e6 / busy.wall_seconds
            runs.append(_Run(rate, None, None, cpu_us, busy.busy_seconds / busy.wall_seconds))
    return _median(name, "MB/s", runs, "" if cold else "servers' page cache warm")


def _drop_caches(file: Path) -> bool:
    """Empties the page cache: of the machine (True), or where that is not allowed of this file."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return True
    except OSError:
        with suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return False


def _median(row: str, unit: str, runs: list[_Run], note: str = "") -> Measurement:
    """The run in the middle, whole: its latencies and its processor time belong to its rate."""
    middle = sorted(runs, key=lambda run: run.value)[len(runs) // 2]
    return Measurement(
        row,
        round(middle.value, 1),
        unit,
        [round(run.value, 1) for run in runs],
        middle.p50_us,
        middle.p99_us,
        round(middle.cpu_us_per_io, 1),
        round(middle.cpu_cores, 2),
        note,
    )


def spread_percent(measurement: Measurement) -> float:
    """How far apart the runs were, of their mean: what a comparison has to exceed to mean anything."""
    mean = statistics.fmean(measurement.runs)
    return 100 * (max(measurement.runs) - min(measurement.runs)) / mean if mean else 0.0


def missing_tools() -> list[str]:
    return [tool for tool in ("fio", "dd") if shutil.which(tool) is None]
