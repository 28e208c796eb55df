"""Goal: kill -9 of everything under load loses nothing that was durable. ``make crash`` is the same for many rounds."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tools.soak.stamps import BLOCK_BYTES, DURABLE, RECORD, WILL, Expected, block_content, read_log

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_durable_is_lost_when_everything_is_killed() -> None:
    argv = [sys.executable, "-m", "tools.soak.killall", "--rounds", "2", "--seed", str(secrets.randbelow(2**32))]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, f"again: {' '.join(argv)}\n{done.stdout}{done.stderr}"
    assert "passed: 2 rounds" in done.stdout


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (block_content(7, 4), None),
        (block_content(7, 5), None),
        (block_content(7, 3), "4 was durable"),
        (bytes(BLOCK_BYTES), "4 was durable"),
        (block_content(7, 6), "never written"),
        (block_content(8, 4), "another's"),
        (block_content(7, 5)[:512] + block_content(7, 4)[512:], "torn"),
        (bytes(512) + block_content(7, 4)[512:], "torn"),
    ],
)
def test_the_judge_sees_what_is_lost(tmp_path: Path, content: bytes, says: str | None) -> None:
    """Goal: the verdict above is worth something."""
    log = tmp_path / "log"
    said = [(WILL, 7, 3), (DURABLE, 7, 3), (WILL, 7, 4), (DURABLE, 7, 4), (WILL, 7, 5)]
    log.write_bytes(b"".join(RECORD.pack(*record) for record in said) + b"a cut off record"[:5])
    expected: dict[int, Expected] = {}
    assert read_log(log, expected) == (3, 2)
    problem = expected[7].problem(7, content)
    assert problem is None if says is None else says in str(problem)


def test_what_was_read_has_to_stay() -> None:
    state = Expected(durable=4, newest=5)
    assert state.problem(7, block_content(7, 5)) is None
    assert "5 was durable" in str(state.problem(7, block_content(7, 4)))
    assert Expected(newest=1).problem(7, bytes(BLOCK_BYTES)) is None
