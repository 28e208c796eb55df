"""A few of the boundaries at which the MDM is killed (``make failpoints`` does all): before and after what is durable,
between the pushes of one change, before and after the answers."""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tools.demo import hosts

ROOT = Path(__file__).resolve().parents[2]
PLACES = [
    "shrink:before commit LeaveOut",
    "promote:after map.changed",
    "rejoin:after commit JoinLearners",
    "remove:before map.changed",
]


@pytest.mark.timeout(150)
def test_the_mdm_is_killed_at_any_moment_and_nothing_is_lost_or_stuck() -> None:
    """Goal: whatever the MDM had said, written or not when it died, IO goes on and all copies are made again."""
    name = f"t{secrets.token_hex(4)}"
    argv = [sys.executable, "-m", "tests.failpoints.run", "--name", name, "--at", *PLACES]
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=140, check=False)
    finally:
        leftovers = hosts.clean(name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not leftovers
    assert re.search(rf"passed: {len(PLACES)} boundaries", done.stdout), done.stdout
