"""Goal: the demonstration's load notices a block that is not what was written there last, and how long nothing came
back."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.waiting import poll_until
from tools.demo.writers import BLOCK_BYTES, BLOCKS_PER_THREAD, THREADS, Writers

OFFSET = 1 << 20


def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    with path.open("wb") as opened:
        opened.truncate(OFFSET + THREADS * BLOCKS_PER_THREAD * BLOCK_BYTES)
    return path


def test_block_that_is_not_as_it_was_written_is_found(tmp_path: Path) -> None:
    path = volume(tmp_path)
    with Writers(path, OFFSET) as writers:
        poll_until(lambda: writers.count > 100)
    assert writers.errors == []
    assert writers.wrong_blocks() == 0
    with path.open("r+b") as opened:
        opened.truncate(OFFSET)
        opened.truncate(OFFSET + THREADS * BLOCKS_PER_THREAD * BLOCK_BYTES)
    assert 0 < writers.wrong_blocks() <= writers.count


def test_error_is_told(tmp_path: Path) -> None:
    path = volume(tmp_path)
    os.truncate(path, 0)
    with Writers(path / "not a file", OFFSET) as writers:
        poll_until(lambda: len(writers.errors) == THREADS)
    assert writers.count == 0


def test_stall_counts_the_time_before_the_first_and_after_the_last(tmp_path: Path) -> None:
    writers = Writers(volume(tmp_path), OFFSET)
    writers._ended = [[1.0, 2.5], [2.0]]
    assert writers.longest_stall(0.5, 2.6) == 1.0
    assert writers.longest_stall(0.5, 5.5) == 3.0
    assert writers.longest_stall(1.5, 2.5) == 0.5
