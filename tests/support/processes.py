"""Processes of a test: whoever starts one here ends it here too, however the test ends."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def running(argv: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """``subprocess.Popen`` that is killed, reaped and has its pipes closed when the block is left."""
    with subprocess.Popen(argv, **options) as process:
        try:
            yield process
        finally:
            # SIGKILL also ends a process that is stopped; one that was waited for is left alone.
            process.kill()
