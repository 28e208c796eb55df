"""The soak, the failover and the rebuild program as a user runs them, for some seconds."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pfvol.constants import CHUNK_SIZE_BYTES
from tools.demo import hosts

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *arguments: str) -> str:
    name = f"t{secrets.token_hex(4)}"
    argv = [sys.executable, "-m", module, "--name", name, *arguments]
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    finally:
        leftovers = hosts.clean(name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not leftovers
    return done.stdout


@pytest.mark.timeout(150)
def test_faults_under_load(tmp_path: Path) -> None:
    """Goal: servers are killed and frozen, IO waits and goes on, and the verdict is on something that was seen."""
    journal = tmp_path / "journal"
    kinds = "kill-sds,kill-mdm,freeze-sds"
    words = ["--faults", "4", "--kinds", kinds, "--sds", "3", "--seed", "736", "--quick", "--journal", str(journal)]
    assert "passed" in run("tools.soak.faults", *words)
    entries: list[dict[str, Any]] = [json.loads(line) for line in journal.read_text().splitlines()]
    by_what = {what: [entry for entry in entries if entry["what"] == what] for what in ("fault", "recovered", "stall")}
    assert len(by_what["recovered"]) == len(by_what["stall"]) == 4 <= len(by_what["fault"])
    assert all(set(entry["seconds"]) == {"sdc1", "sdc2"} for entry in by_what["stall"])
    verdict = entries[-1]
    assert verdict["what"] == "verdict"
    assert verdict["problems"] == []
    assert verdict["errors"] == 0
    assert verdict["operations"] > 4 * 2000  # the read-back of two volumes through two mounts, and more


@pytest.mark.timeout(150)
def test_stalls_are_measured(tmp_path: Path) -> None:
    """Goal: a server that is away for half a second or more, and no IO fails; how long it may take is not for here."""
    output = tmp_path / "figures"
    words = ["--kills", "1", "--hangs", "1", "--hang-seconds", "1", "--mdm-seconds", "0", "--seed", "3"]
    limits = ["--stall-max", "60", "--median-max", "60"]
    said = run("tools.soak.failover", *words, *limits, "--output", str(output))
    assert "passed" in said
    figures = json.loads(output.read_text())
    assert [one["fault"] for one in figures["measured"]] == ["killed", "hangs"]
    assert all(one["ios"] > 100 for one in figures["measured"])
    assert all(0 < one["stall_seconds"] < 60 for one in figures["measured"])


@pytest.mark.timeout(150)
def test_lost_copies_are_made_again_under_load(tmp_path: Path) -> None:
    """Goal: the plan's scenario B in small: nothing is lost, no slot is left; what it costs is not for here."""
    output = tmp_path / "figures"
    words = ["--sds-mib", "64", "--limits", "40", "--no-change", "--turns", "", "--delay", "1", "--quiet-seconds", "1"]
    limits = ["--p99-ratio-max", "1000", "--rate-error-max", "1", "--seed", "11"]
    assert "passed" in run("tools.soak.rebuild", *words, *limits, "--output", str(output))
    (one,) = json.loads(output.read_text())["rounds"]
    assert one["bytes"] >= 12 * CHUNK_SIZE_BYTES  # a quarter of the copies, and what was written twice meanwhile
    assert one["free_slots"] == 0
    assert one["took_seconds"] > 0.5 * one["bytes"] / 40_000_000
