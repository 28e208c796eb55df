"""``make bench``: the matrix on a volume of a local cluster (or on any file), then every layer; a table, and JSON.

Figures of different runs or machines do not compare: the JSON says where and when they were taken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pfvol import __version__, localcluster
from tools.bench import layers, matrix

GIB = 1024**3
HEADINGS = "row                 value          p50 us    p99 us  CPU us/IO  cores  spread"
LAYER_HEADINGS = f"{'layer':<10} {'':<40} {'value':>14} {'':<10} {'CPU us each':>11}"


def main() -> int:
    arguments = parse()
    if missing := matrix.missing_tools():
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"about": about(arguments), "matrix": [], "layers": []}
    if not arguments.layers_only:
        with measured_file(arguments) as file:
            print(HEADINGS)
            found = matrix.measure(
                file,
                arguments.size,
                arguments.rows,
                seconds=arguments.seconds,
                repetitions=arguments.repetitions,
                on_row=print_row,
            )
            results["matrix"] = [row.as_dict() for row in found]
    if not arguments.no_layers:
        print(LAYER_HEADINGS)
        results["layers"] = [run_layer(name, arguments.layer_seconds) for name in layers.names()]
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {arguments.output}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--file", type=Path, help="measure this file instead of a volume of a new local cluster")
    parser.add_argument("--size", type=int, default=GIB, help="bytes of the file to work on (default 1 GiB)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run of a row")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each row; the median counts")
    parser.add_argument("--rows", nargs="+", default=list(matrix.ROW_NAMES), choices=matrix.ROW_NAMES)
    parser.add_argument("--layer-seconds", type=float, default=2.0)
    parser.add_argument("--no-layers", action="store_true")
    parser.add_argument("--layers-only", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("bench.results.json"))
    return parser.parse_args()


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "pfvol": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "size_bytes": arguments.size,
        "seconds": arguments.seconds,
        "repetitions": arguments.repetitions,
    }


@contextmanager
def measured_file(arguments: argparse.Namespace) -> Iterator[Path]:
    """The file to measure: the given one, or a volume of a cluster that is made for this and gone afterwards."""
    if arguments.file:
        yield arguments.file
        return
    with tempfile.TemporaryDirectory(prefix="pfvol-bench-") as scratch:
        data_dir, mountpoint = Path(scratch, "data"), Path(scratch, "mnt")
        mountpoint.mkdir()
        localcluster.up(data_dir)
        try:
            size_mib = -(-arguments.size // matrix.MIB)
            pfvol(data_dir, "vol", "create", localcluster.POOL, "bench", f"{size_mib}MiB")
            pfvol(data_dir, "mount", str(mountpoint), "--sdc", "bench")
            try:
                pfvol(data_dir, "vol", "map", "bench", "bench")
                await_file(mountpoint / "bench")
                yield mountpoint / "bench"
            finally:
                pfvol(data_dir, "umount", str(mountpoint))
        finally:
            localcluster.down(data_dir)


def pfvol(data_dir: Path, *arguments: str) -> None:
    argv = [sys.executable, "-m", "pfvol.cli", "--data-dir", str(data_dir), "-q", *arguments]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


def await_file(path: Path, timeout_seconds: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear within {timeout_seconds} s")
        time.sleep(0.05)


def print_row(row: matrix.Measurement) -> None:
    spread = f"{matrix.spread_percent(row):.0f} %"
    p50, p99 = (f"{value:.1f}" if value is not None else "-" for value in (row.p50_us, row.p99_us))
    print(
        f"{row.row:<14} {row.value:>10,.0f} {row.unit:<5} {p50:>9} {p99:>9} {row.cpu_us_per_io:>10.1f} "
        f"{row.cpu_cores:>6.2f} {spread:>7} {row.note}",
        flush=True,
    )


def run_layer(name: str, seconds: float) -> dict[str, Any]:
    result = layers.run(name, seconds)
    for row in result["rows"]:
        print(
            f"{result['layer']:<10} {row['name']:<40} {row['value']:>14,.0f} {row['unit']:<10} {row['cpu_us']:>11,.2f}",
            flush=True,
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
