"""Goal: fio and dd find every byte again, also after unmount and mount and a restart. ``make verify``: for longer."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_written_comes_back() -> None:
    argv = [sys.executable, "-m", "tools.soak.verify", "--mib", "16", "--seed", str(secrets.randbelow(2**31))]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, f"again: {' '.join(argv)}\n{done.stdout}{done.stderr}"
    assert done.stdout.count("blocks, ") == 6
    assert done.stdout.count("vol verify: clean") == 3
