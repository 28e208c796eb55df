"""What the programs on several hosts share: their options, the cluster's begin and end, and the verdict."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pfvol.errors import Error
from tools.demo.hosts import Hosts, HostsError, Shape, cluster
from tools.demo.network import NetworkError
from tools.soak.load import logs_of
from tools.soak.world import SoakError


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Those of every such program; ``name`` is the hosts' unless another is given."""
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument(
        "--namespaces",
        action="store_true",
        help="hosts that are network namespaces, and can be cut from each other (needs root)",
    )
    parser.add_argument("--name", default=name, help="of the hosts (python -m tools.demo.hosts)")
    parser.add_argument("--keep", action="store_true", help="leave the cluster of a run that failed")


@contextmanager
def told(problems: list[str]) -> Iterator[None]:
    """What ends a run is one of its problems."""
    try:
        yield
    except (SoakError, HostsError, NetworkError, Error, OSError, subprocess.TimeoutExpired) as error:
        problems.append(str(error))


def on_hosts(arguments: argparse.Namespace, shape: Shape, run: Callable[[Hosts], list[str]]) -> list[str]:
    """``run`` on a cluster of its own; what was not as it must be, by its own word or because it was broken off."""
    problems: list[str] = []
    with told(problems), cluster(arguments.name, shape, loopback=not arguments.namespaces) as hosts:
        try:
            problems += run(hosts)
            hosts.kept = arguments.keep and bool(problems)
        except (SoakError, HostsError, Error):
            print(logs_of(hosts))
            hosts.kept = arguments.keep
            raise
    return problems


def report(
    arguments: argparse.Namespace, problems: Sequence[str], figures: Mapping[str, Any], table: Sequence[str]
) -> int:
    """Writes the figures to ``--output``, prints the table and the verdict; the exit code."""
    document = {"seed": arguments.seed, "problems": problems, **figures}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(table))
    return verdict(problems)


def verdict(problems: Sequence[str], passed: str = "passed") -> int:
    """Prints it; the exit code."""
    print("\n".join(f"FAILED: {problem}" for problem in problems) or passed)
    return 1 if problems else 0
