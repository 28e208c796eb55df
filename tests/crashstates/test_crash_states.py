"""A sample of the search of crash states (``make crashstates`` does all), and of the mistakes that it has to find."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    argv = [sys.executable, "-m", "tests.crashstates.run", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, cwd=REPOSITORY)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_state_of_the_disk_loses_what_was_flushed() -> None:
    """Goal: after a loss of power at any operation, recovery keeps what was flushed and reports what may differ."""
    told = run("--states", "1500", "--nested", "0.0005", "--cuts", "0.0003")
    passed = re.search(r"passed: (\d+) workloads, (\d+) states", told)
    assert passed is not None
    assert int(passed[1]) >= 10
    assert int(passed[2]) >= 1500


def test_a_sync_that_is_left_out_is_found() -> None:
    """Goal: the search has teeth: without a sync of the tags, the journal, or a directory it finds what is lost."""
    assert re.search(r"(\d) of \1 mistakes found", run("--mistakes", "--every", "5"))
