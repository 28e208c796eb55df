"""Goal: what an SDS suffers on purpose is durable before it is in force, and outlives the process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datapath import disk
from pfvol.errors import ConfigError, InvalidError
from pfvol.faults import DiskDelay, DiskError
from pfvol.sds.faults import FAULTS_FILE, Faults


@pytest.fixture(autouse=True)
def healthy_disks() -> Iterator[None]:
    yield
    disk.clear()


def test_what_was_ordered_is_known_to_the_next_process(tmp_path: Path) -> None:
    faults = Faults(tmp_path)
    faults.fail(1000)
    faults.inject([DiskError("pread", "EIO", 5)], [DiskDelay("pwrite", 20)], clear=False)
    again = Faults(tmp_path)
    assert again.describe() == faults.describe()
    assert again.failed
    again.recover()
    assert not Faults(tmp_path).failed
    assert Faults(tmp_path).revision == faults.revision + 1


@pytest.mark.parametrize(
    "order",
    [
        lambda faults: faults.fail(None),
        lambda faults: faults.fail(5),
        lambda faults: faults.recover(),
        lambda faults: faults.inject([DiskError("pread", "EIO", 7)], [], clear=True),
    ],
    ids=["fail", "fail for a while", "recover", "inject"],
)
def test_what_cannot_be_saved_is_not_in_force(tmp_path: Path, order: Callable[[Faults], None]) -> None:
    faults = Faults(tmp_path)
    faults.fail(1000)
    faults.inject([DiskError("pread", "EIO", 5)], [], clear=False)
    before = faults.describe()
    obstacle = tmp_path / f"{FAULTS_FILE}.new"
    obstacle.mkdir()
    with pytest.raises(ConfigError, match=FAULTS_FILE):
        order(faults)
    assert faults.describe() == before
    obstacle.rmdir()
    order(faults)
    assert faults.revision == before["revision"] + 1


@pytest.mark.parametrize("seconds", [0, -1, 1e9, math.inf, math.nan])
def test_a_failure_ends_some_day(tmp_path: Path, seconds: float) -> None:
    faults = Faults(tmp_path)
    with pytest.raises(InvalidError, match="lasts more than 0"):
        faults.fail(seconds)
    assert not faults.failed
