"""Faults of this process's disks on purpose: filters in front of the engine's calls."""

CALLS: tuple[str, ...]
"""The calls that can be filtered."""

def inject_error(call: str, error: int, per_million: int) -> None:
    """Of a million such calls this many fail with this errno, chosen by chance, in place of the error before.

    ENOSPC strikes only calls that may need room on the disk.
    """

def inject_delay(call: str, delay_ns: int) -> None:
    """Each such call waits so long first; 0: none does."""

def clear() -> None:
    """No call is filtered any more."""

def injected() -> dict[str, tuple[int, int]]:
    """Per call, since the process started: how many were made to fail, how many to wait."""
