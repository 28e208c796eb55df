"""Goal: the verdict of ``make memory`` is worth something: it sees a leak, and takes no warm-up for one."""

from __future__ import annotations

import os

import pytest

from tools.soak.memory import MB, Sample, look, problems
from tools.soak.world import SoakError

WARM_UP_SECONDS = 120.0


def run_of(
    *, idle_mb: float = 40, warm_up_mb: float = 0, leak_mb: float = 0, leaked_descriptors: int = 0
) -> list[Sample]:
    """Ten minutes of sds1: what it takes while idle, at once under load, and more and more until the end."""
    samples = [Sample("sds1", -1.0, int(idle_mb * MB), int(idle_mb * MB), 40)]
    for number in range(1, 121):
        rss = int((idle_mb + warm_up_mb * min(1, number / 20) + leak_mb * number / 120) * MB)
        samples.append(Sample("sds1", number * 5.0, rss, rss, 40 + leaked_descriptors * number // 120))
    return samples


def test_flat_after_the_warm_up_is_well() -> None:
    assert problems(run_of(warm_up_mb=60), WARM_UP_SECONDS) == []


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (run_of(leak_mb=10), "sds1: rss_bytes grew"),
        (run_of(leaked_descriptors=10), "sds1: descriptors grew"),
        (run_of(idle_mb=81), "idle"),
    ],
)
def test_what_is_wrong_is_seen(samples: list[Sample], says: str) -> None:
    assert says in problems(samples, WARM_UP_SECONDS)[0]


def test_too_short_a_run_is_no_verdict() -> None:
    with pytest.raises(SoakError, match="too few"):
        problems(run_of()[:30], WARM_UP_SECONDS)


def test_a_process_is_looked_at_as_the_kernel_sees_it() -> None:
    sample = look("this", os.getpid(), 0.0)
    assert sample.rss_bytes > MB
    assert 0 < sample.pss_bytes <= sample.rss_bytes * 2
    assert sample.descriptors >= 3
