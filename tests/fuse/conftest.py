"""Volumes for the tests of mounts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

_numbers = itertools.count(1)


@pytest.fixture
def new_volume(cluster: Any) -> Iterator[Callable[..., str]]:
    """``new_volume(size, *options)``: a volume with a name of its own in the session's cluster, gone after the test."""
    made: list[str] = []

    def make(size: str = "32MiB", *options: str) -> str:
        name = f"fuse{next(_numbers)}"
        cluster.volume(name, size, *options)
        made.append(name)
        return name

    yield make
    for name in made:
        for mapping in cluster.cli("vol", "show", name)["mappings"]:
            cluster.cli("vol", "unmap", name, mapping["sdc_name"])
        cluster.cli("vol", "delete", name)
