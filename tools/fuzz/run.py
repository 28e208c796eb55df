"""Runs every ``fuzz_*.py`` beside it for some minutes, at the same time, and fails if one of them does.

Each program takes ``--seconds`` and ``--seed``, prints one summary line, and on a finding ends with another exit code
than 0. What it takes to see a finding again is printed as a command.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    seconds = arguments.minutes * 60
    programs = sorted(path.stem for path in Path(__file__).parent.glob("fuzz_*.py"))
    running = {name: start(name, seconds, arguments.seed) for name in programs}
    failed = []
    for name, process in running.items():
        output, _ = process.communicate(timeout=seconds + 300)
        print(f"{name}: {output.strip() or 'no output'}", flush=True)
        if process.returncode:
            failed.append(name)
            print(f"{name} ended with {process.returncode}; again: {' '.join(command(name, seconds, arguments.seed))}")
    print(f"{len(programs) - len(failed)} passed, {len(failed)} failed")
    return bool(failed)


def command(name: str, seconds: float, seed: int) -> list[str]:
    return [sys.executable, "-m", f"tools.fuzz.{name}", "--seconds", f"{seconds:g}", "--seed", str(seed)]


def start(name: str, seconds: float, seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(name, seconds, seed),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


if __name__ == "__main__":
    sys.exit(main())
