"""The network of "hosts" on one machine: a namespace each with a switch between them, or addresses of the loopback.

``Namespaces``: each host is a network namespace with one interface, ``eth0``; a switch (a bridge in a namespace of its
own) joins them; one more link goes from the switch to this machine, so that it can administer what runs in there. A cut
is a rule of the host that no longer hears: packets are dropped, never refused, as with a cable that is pulled. Needs
root, ``ip`` and ``nft``. Whatever it makes has a name that starts with ``PREFIX`` and the network's name, and
``remove`` finds it by that alone.

``Loopback``: each host is an address; needs no privilege, and nothing can be cut.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from pfvol import childprocess

PREFIX = "pfvolh"
SWITCH = "switch"
LINK_PREFIX = "pfvh"  # interface names have 15 letters at most
NAME = re.compile(r"[a-z0-9]{1,11}")
# Set aside for tests of networks (RFC 2544): no real host has such an address.
RANGE = ipaddress.IPv4Network("198.18.0.0/15")
TOOL_SECONDS = 30
TABLE = "inet pfvol"
RULES = f"""table {TABLE} {{
    set cut {{ type ipv4_addr; }}
    chain input {{ type filter hook input priority 0; ip saddr @cut drop; }}
}}
"""
# Where ip and nft are is not always on the path.
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class NetworkError(Exception):
    """The network cannot be made, or not be changed like that."""


class Network(Protocol):
    """Where each host is, and how a program is run there."""

    addresses: dict[str, str]

    def argv(self, host: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` on that host: the process is the program's own, not a parent of it."""

    def cut(self, source: str, targets: Sequence[str]) -> None:
        """From now on ``targets`` hear nothing from ``source``; they may still speak to it."""

    def heal(self) -> None:
        """Everybody hears everybody."""


class Loopback:
    """Hosts that are addresses."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self.addresses = addresses

    @classmethod
    def make(cls, hosts: Sequence[str]) -> Loopback:
        first = ipaddress.ip_address(f"127.{random.randrange(16, 250)}.{random.randrange(256)}.1")
        return cls({host: str(first + number) for number, host in enumerate(hosts, 1)})

    def argv(self, host: str, argv: Sequence[str]) -> list[str]:
        return list(argv)

    def cut(self, source: str, targets: Sequence[str]) -> None:
        raise NetworkError("addresses of the loopback cannot be cut from each other: this needs namespaces")

    def heal(self) -> None:
        pass


class Namespaces:
    """Hosts that are network namespaces. ``make`` makes them, ``remove`` ends them, also those of a run that died."""

    def __init__(self, name: str, addresses: dict[str, str]) -> None:
        self.name = name
        self.addresses = addresses

    @classmethod
    def make(cls, name: str, hosts: Sequence[str]) -> Namespaces:
        """What it has made when it fails is left to ``remove``."""
        if not NAME.fullmatch(name):
            raise NetworkError(f"{name!r} is no name for a network: 1 to 11 of a-z 0-9")
        for tool in ("ip", "nft", "nsenter"):
            if not _tool(tool):
                raise NetworkError(f"{tool} is not installed: namespaces need iproute2, nftables and util-linux")
        with _alone():
            if names := _namespaces(name):
                raise NetworkError(f"there is a network {name} already ({names[0]}): clean it, or choose another name")
            subnet = _free_subnet()
            network = cls(name, {host: str(subnet[number]) for number, host in enumerate(hosts, 2)})
            network._make_switch(f"{subnet[1]}/{subnet.prefixlen}")
        for host in hosts:
            network._make_host(host, subnet.prefixlen)
        return network

    def _make_switch(self, address: str) -> None:
        switch, link = self._namespace(SWITCH), f"{LINK_PREFIX}{self.name}"
        _ip("netns", "add", switch)
        # Spanning tree and snooping off: a link that comes up carries packets at once.
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        _ip("-n", switch, "link", "set", "bridge", "up")
        _ip("link", "add", link, "type", "veth", "peer", "name", "control", "netns", switch)
        _ip("-n", switch, "link", "set", "dev", "control", "master", "bridge", "up")
        _ip("address", "add", address, "dev", link)
        _ip("link", "set", "dev", link, "up")

    def _make_host(self, host: str, prefix_length: int) -> None:
        namespace, switch = self._namespace(host), self._namespace(SWITCH)
        _ip("netns", "add", namespace)
        _ip("link", "add", "eth0", "netns", namespace, "type", "veth", "peer", "name", host, "netns", switch)
        _ip("-n", switch, "link", "set", "dev", host, "master", "bridge", "up")
        _ip("-n", namespace, "address", "add", f"{self.addresses[host]}/{prefix_length}", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        self._nft(host, RULES)

    def argv(self, host: str, argv: Sequence[str]) -> list[str]:
        # Not `ip netns exec`: it also takes the program into a mount namespace, where nobody sees its mounts.
        return ["nsenter", f"--net=/run/netns/{self._namespace(host)}", "--", *argv]

    def cut(self, source: str, targets: Sequence[str]) -> None:
        for target in targets:
            self._nft(target, f"add element {TABLE} cut {{ {self.addresses[source]} }}\n")

    def heal(self) -> None:
        for host in self.addresses:
            self._nft(host, f"flush set {TABLE} cut\n")

    def _namespace(self, host: str) -> str:
        return f"{PREFIX}-{self.name}-{host}"

    def _nft(self, host: str, commands: str) -> None:
        _run(self.argv(host, ["nft", "-f", "-"]), commands)


def remove(name: str) -> list[str]:
    """Kills what runs in the namespaces of a network and removes them; returns their names. None there is all right."""
    namespaces = _namespaces(name)
    for namespace in namespaces:
        pids = (int(word) for word in _ip("netns", "pids", namespace).split())
        childprocess.kill([identity for pid in pids if (identity := childprocess.identify(pid))])
    for namespace in namespaces:
        _ip("netns", "delete", namespace)
    link = f"{LINK_PREFIX}{name}"
    if namespaces and _exists(link):
        try:
            _ip("link", "delete", "dev", link)  # It would go with the switch, a moment later.
        except NetworkError:
            if _exists(link):
                raise
    return namespaces


def _exists(link: str) -> bool:
    return any(entry["ifname"] == link for entry in json.loads(_ip("-j", "link")))


def networks() -> list[str]:
    """The names of all networks on this machine."""
    return sorted({namespace.split("-")[1] for namespace in _namespaces(None)})


def _namespaces(network: str | None) -> list[str]:
    """Of one network, or of all."""
    if not _tool("ip"):
        return []
    words = (line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip())
    prefix = f"{PREFIX}-{network}-" if network else f"{PREFIX}-"
    return sorted(word for word in words if word.startswith(prefix) and word.count("-") >= 2)


@contextmanager
def _alone() -> Iterator[None]:
    """Two that look for free addresses at once would find the same."""
    path = Path(tempfile.gettempdir(), f"{PREFIX}.lock")
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _free_subnet() -> ipaddress.IPv4Network:
    routes = json.loads(_ip("-j", "route", "show", "table", "all", "type", "unicast"))
    destinations = [route["dst"] for route in routes if route["dst"] != "default"]
    used = [ipaddress.IPv4Network(text, strict=False) for text in destinations if ":" not in text]
    candidates = list(RANGE.subnets(new_prefix=24))
    for subnet in random.sample(candidates, len(candidates)):
        if not any(subnet.overlaps(network) for network in used):
            return subnet
    raise NetworkError(f"no free network in {RANGE}: ip route shows what is there")


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _tool(name: str) -> str | None:
    return shutil.which(name, path=_PATH)


def _run(argv: list[str], words: str = "") -> str:
    argv = [_tool(argv[0]) or argv[0], *argv[1:]]
    environment = os.environ | {"PATH": _PATH}
    done = subprocess.run(
        argv, input=words, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False, env=environment
    )
    if done.returncode:
        raise NetworkError(f"{' '.join(argv)} failed: {done.stderr.strip()}")
    return done.stdout
