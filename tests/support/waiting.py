"""Waiting for something to become true: the only way that tests wait for another process."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

import trio

T = TypeVar("T")

POLL_SECONDS = 0.03
TIMEOUT_SECONDS = 20.0
STAYS_SECONDS = 1.0


def poll_until(condition: Callable[[], T], timeout_seconds: float = TIMEOUT_SECONDS, what: str = "") -> T:
    """Calls ``condition`` until it returns something true, which is returned; AssertionError at the deadline."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_seconds} s: {what or condition}; the last answer was {value!r}")
        time.sleep(POLL_SECONDS)


async def pass_time(seconds: float) -> None:
    """For tests of what time does: that vary the moment at which something happens, or show that nothing does. Not for
    waiting."""
    await trio.sleep(seconds)


async def poll_until_async(
    condition: Callable[[], Awaitable[T] | T], timeout_seconds: float = TIMEOUT_SECONDS, what: str = ""
) -> T:
    """``poll_until`` on trio; the condition may be asynchronous."""
    deadline = trio.current_time() + timeout_seconds
    while True:
        asked = condition()
        value = await asked if inspect.isawaitable(asked) else cast(T, asked)
        if value:
            return value
        if trio.current_time() > deadline:
            raise AssertionError(f"not within {timeout_seconds} s: {what or condition}; the last answer was {value!r}")
        await trio.sleep(POLL_SECONDS)


async def comes_to(told: Callable[[], T], wanted: T) -> None:
    """On the mock clock: polls until ``told()`` is ``wanted``, and a second later it still has to be."""
    with contextlib.suppress(AssertionError):
        await poll_until_async(lambda: told() == wanted)
    await pass_time(STAYS_SECONDS)
    assert told() == wanted
