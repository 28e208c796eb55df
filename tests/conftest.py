"""Fixtures for every test, the order of the layers, and the promise that a run leaves nothing behind.

- ``cluster``: one running cluster for the whole session (three SDSs): make volumes of your own in it, break nothing;
- ``fresh_cluster``: a factory of clusters for one test, to be broken at will;
- ``mounted``: a factory of mounts, gone after the test;
- ``cli``: the command line as a process;
- ``root``: fails the test if it is not run as root.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.support.cli import CliResult, run_cli

# How long an example takes is no property of what is tested: other work may have the machine.
hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")

LAYERS = ("unit", "golden", "property", "model", "integration", "api", "cli", "fuse", "package")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The layers from the bottom up; within one, as collected."""
    items.sort(key=_layer)


def _layer(item: pytest.Item) -> int:
    parts = Path(item.path).relative_to(Path(__file__).parent).parts
    return LAYERS.index(parts[0]) if parts[0] in LAYERS else len(LAYERS)


@pytest.fixture(scope="session")
def _base_dir() -> Iterator[Path]:
    """Where clusters and mounts of this session live. What still runs or is mounted there at the end is reported."""
    base = Path(tempfile.mkdtemp(prefix="pfvol-test-"))
    yield base
    leftovers = _sweep(base)
    shutil.rmtree(base, ignore_errors=True)
    assert not leftovers, f"left behind by the tests: {leftovers}"


def _sweep(base: Path) -> list[str]:
    from pfvol import childprocess
    from tests.support.cluster import detach, mountpoints

    prefix = f"{base}/"
    found = []
    for mountpoint in mountpoints():
        if mountpoint.startswith(prefix):
            found.append(mountpoint)
            detach(Path(mountpoint))
    for entry in os.listdir("/proc"):
        words = childprocess.command_line(int(entry)) if entry.isdigit() else []
        if any(word.startswith(prefix) for word in words):
            found.append(" ".join(words))
            identity = childprocess.identify(int(entry))
            childprocess.kill([identity] if identity else [])
    return found


@pytest.fixture(scope="session")
def _session_cluster(_base_dir: Path) -> Iterator[Any]:
    from tests.support.cluster import TestCluster

    cluster = TestCluster(_base_dir / "session")
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.discard()


@pytest.fixture
def cluster(_session_cluster: Any) -> Iterator[Any]:
    """The session's cluster (``tests.support.cluster.TestCluster``); mounts of it go with the test."""
    yield _session_cluster
    for mount in list(_session_cluster.mounts):
        mount.discard()
        if mount in _session_cluster.mounts:
            _session_cluster.mounts.remove(mount)


@pytest.fixture
def fresh_cluster(_base_dir: Path) -> Iterator[Callable[..., Any]]:
    """``fresh_cluster(**shape)``: a cluster of this test alone; ``start=False`` makes only the object."""
    from tests.support.cluster import TestCluster

    made: list[TestCluster] = []

    def make(*, start: bool = True, **shape: Any) -> TestCluster:
        directory = Path(tempfile.mkdtemp(prefix="cluster-", dir=_base_dir))
        made.append(TestCluster(directory / "data"))
        if start:
            made[-1].up(**shape)
        return made[-1]

    yield make
    for one in made:
        one.discard()
        shutil.rmtree(one.data_dir.parent, ignore_errors=True)


@pytest.fixture
def mounted(cluster: Any) -> Callable[..., Any]:
    """``mounted(*volumes, sdc=None, options=())``: a mount of the session's cluster with these volumes mapped."""

    def make(*volumes: str, sdc: str | None = None, options: tuple[str, ...] = ()) -> Any:
        mount = cluster.mount(sdc=sdc, options=options)
        for volume in volumes:
            cluster.cli("vol", "map", volume, mount.sdc)
        _await_volumes(mount, volumes)
        return mount

    return make


def _await_volumes(mount: Any, volumes: tuple[str, ...]) -> None:
    from tests.support.waiting import poll_until

    poll_until(lambda: set(volumes) <= set(os.listdir(mount.path)), what=f"{volumes} in {mount.path}")


@pytest.fixture
def root() -> None:
    """For what the kernel lets root alone do. A test that cannot be run has not passed."""
    if os.geteuid() != 0:
        pytest.fail("only root may mount, attach loop devices and make namespaces: run the suite as root", False)


@pytest.fixture
def cli() -> Callable[..., CliResult]:
    """``cli(*arguments, data_dir=None, json_output=False, check=False, env=None) -> CliResult``."""
    return run_cli
