"""Goal: an SDS engine gives back what it took, once, however its object is disposed of."""

from __future__ import annotations

import gc
import os

import pytest

from datapath.target import Target


def descriptors() -> dict[str, str]:
    """What each descriptor of this process stands for."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


@pytest.mark.parametrize("in_a_cycle", [False, True], ids=["counted", "collected"])
@pytest.mark.parametrize("started", [False, True], ids=["unused", "stopped"])
def test_no_descriptor_of_another_is_closed_when_an_engine_goes(started: bool, in_a_cycle: bool) -> None:
    gc.collect()
    before = descriptors()
    target = Target(3, 1, 1)
    if started:
        target.start()
        target.stop()
    holder = [target]
    if in_a_cycle:
        holder.append(holder)  # type: ignore[arg-type]
    # These take the numbers that the stopped engine has given back already.
    pipes = [os.pipe() for _ in range(8)]
    del target, holder
    gc.collect()
    try:
        for end in (end for pipe in pipes for end in pipe):
            os.fstat(end)
    finally:
        for end in (end for pipe in pipes for end in pipe):
            os.close(end)
    assert descriptors() == before
