"""Runs the layer benchmarks beside it: each ``layer_*.py`` measures one layer with nothing above or below it, so that a
slow layer shows by itself.

A layer program takes ``--seconds`` (per figure) and prints one JSON object:
``{"layer": NAME, "rows": [{"name", "value", "unit", "cpu_us"}]}``. ``cpu_us`` is what the layer's own process spent on
one of them: an IO, a block, a frame, a MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def names() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("layer_*.py"))


def run(name: str, seconds: float) -> dict[str, Any]:
    """One layer's object; RuntimeError with what the program said when it fails."""
    argv = [sys.executable, "-m", f"tools.bench.{name}", "--seconds", f"{seconds:g}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120 + 60 * seconds, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# -- what layer programs are made of


def rate(name: str, unit: str, seconds: float, batch: Callable[[], float]) -> Row:
    """Calls ``batch``, which returns how much it did, for ``seconds``: the best rate of five stretches.

    The best, not the mean: what a layer can do is what it does when nothing else disturbs it.
    """
    stretches = []
    for _ in range(5):
        done, started, cpu_started = 0.0, time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - started) < seconds / 5 or not done:
            done += batch()
        stretches.append((done / elapsed, (time.process_time() - cpu_started) / done))
    value, cpu_seconds = max(stretches)
    return row(name, value, unit, cpu_seconds)


def row(name: str, value: float, unit: str, cpu_seconds: float) -> Row:
    return {"name": name, "value": round(value, 1), "unit": unit, "cpu_us": round(cpu_seconds * 1e6, 3)}


def main(layer: str, measure: Callable[[float], list[Row]]) -> None:
    parser = argparse.ArgumentParser(description=f"Measures {layer} alone.")
    parser.add_argument("--seconds", type=float, default=2.0, help="per figure")
    json.dump({"layer": layer, "rows": measure(parser.parse_args().seconds)}, sys.stdout, indent=2)
    print()
