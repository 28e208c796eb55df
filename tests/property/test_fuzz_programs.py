"""The fuzzers run, and find nothing in a second. ``make fuzz`` is the same for as long as one likes."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(path.stem for path in (ROOT / "tools" / "fuzz").glob("fuzz_*.py"))


@pytest.mark.parametrize("program", PROGRAMS)
def test_fuzzer_finds_nothing(program: str) -> None:
    """Goal: damaged input of a new seed each time is refused, never obeyed; a failing seed is printed as a command."""
    argv = [sys.executable, "-m", f"tools.fuzz.{program}", "--seconds", "1", "--seed", str(secrets.randbelow(2**32))]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"again: {' '.join(argv)}\n{done.stdout}{done.stderr}"
    assert "seed" in done.stdout
