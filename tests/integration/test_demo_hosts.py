"""Hosts as network namespaces: who hears whom, and that nothing of them is left, however they end."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pfvol.sdc import records
from tests.support.cluster import mountpoints
from tests.support.processes import running
from tests.support.waiting import poll_until
from tools.demo import hosts as demo
from tools.demo import network
from tools.demo.hosts import Hosts, HostsError, Shape
from tools.demo.network import Namespaces, NetworkError

pytestmark = pytest.mark.usefixtures("root")

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(sds=2, sdcs=1)
# Says a word to HOST:PORT, or waits for one for as long as it takes, or SECONDS.
SAY = "import socket,sys; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', (sys.argv[1], 7000))"
HEAR = """
import socket, sys
ears = socket.socket(type=socket.SOCK_DGRAM)
ears.bind((sys.argv[1], 7000))
print("listening", flush=True)
for _ in iter(lambda: print(ears.recvfrom(9)[1][0], flush=True), 0): pass
"""


@pytest.fixture
def name() -> Iterator[str]:
    name = f"t{secrets.token_hex(4)}"
    yield name
    demo.clean(name)
    assert name not in demo.all_names()


def say(net: Namespaces, source: str, target: str) -> None:
    argv = net.argv(source, [sys.executable, "-c", SAY, net.addresses[target]])
    subprocess.run(argv, check=True, timeout=20)


def test_cuts_are_heard(name: str) -> None:
    """Goal: a cut drops what goes one way and nothing else, and heal undoes it."""
    net = Namespaces.make(name, ["a", "b", "c"])
    argv = net.argv("b", [sys.executable, "-c", HEAR, net.addresses["b"]])
    with running(argv, stdout=subprocess.PIPE, text=True) as ears:
        assert ears.stdout is not None
        assert ears.stdout.readline() == "listening\n"

        def hears(*sources: str) -> list[str]:
            """Who of these is heard by b; c comes last and is always heard, so that there is something to wait for."""
            for source in (*sources, "c"):
                say(net, source, "b")
            heard = []
            while not heard or heard[-1] != net.addresses["c"]:
                heard.append(ears.stdout.readline().strip())  # type: ignore[union-attr]
            return heard[:-1]

        assert hears("a") == [net.addresses["a"]]
        net.cut("a", ["b"])
        assert hears("a", "a") == []
        net.cut("a", ["b"])  # again is nothing new
        net.heal()
        assert hears("a") == [net.addresses["a"]]
        net.cut("b", ["a"])  # the other way: b still hears
        assert hears("a") == [net.addresses["a"]]


def test_two_networks_do_not_clash(name: str) -> None:
    """Goal: a name is used once, and each network has addresses of its own."""
    first = Namespaces.make(name, ["a"])
    with pytest.raises(NetworkError, match="there is a network"):
        Namespaces.make(name, ["a"])
    with pytest.raises(NetworkError, match="no name"):
        Namespaces.make("Not-A-Name", ["a"])
    other = f"{name}x"
    try:
        second = Namespaces.make(other, ["a"])
        assert first.addresses["a"].rpartition(".")[0] != second.addresses["a"].rpartition(".")[0]
        assert {name, other} <= set(network.networks())
    finally:
        assert network.remove(other)
    assert network.networks().count(other) == 0
    assert name in network.networks()
    assert network.remove(f"{name}y") == []


def test_a_cluster_serves_across_namespaces(name: str) -> None:
    """Goal: real daemons, a node each; one that was killed is started again; the command line does it too."""
    hosts = Hosts.make(name, SHAPE)
    with pytest.raises(HostsError, match="there already"):
        Hosts.make(name, SHAPE)
    hosts.begin()
    assert hosts.await_health(30) < 30
    hosts.volume("vol1", 64 * 1024**2, ["sdc1"])
    hosts.mount("sdc1", "direct")
    volume = hosts.mountpoint("sdc1") / "vol1"
    with volume.open("r+b") as file:
        file.write(b"across" * 1000)
    assert demo.main(["--name", name, "cut", "sds1", "sds2"]) == 0
    assert demo.main(["--name", name, "heal"]) == 0
    assert demo.main(["--name", name, "cut", "nobody"]) == 1
    an_sdc_that_reaches_one_server_reads_and_goes_on_when_healed(hosts, volume)
    before = hosts.process("sds1")
    assert demo.main(["--name", name, "kill", "sds1"]) == 0
    assert hosts.process("sds1") is None
    assert hosts.health() != "OK"
    assert demo.main(["--name", name, "start", "sds1"]) == 0
    assert hosts.await_health(30) < 30
    assert hosts.process("sds1") != before
    with volume.open("rb") as file:
        assert file.read(6) == b"across"
    assert "sds2" in hosts.pfvol("sdc1", "sds", "list")


def an_sdc_that_reaches_one_server_reads_and_goes_on_when_healed(hosts: Hosts, volume: Path) -> None:
    """Goal: what the other server leads can be read; writes wait, and go on soon after the cut, however long it was:
    the connection is given up, where the kernel would try it at twice the interval each time."""
    chunk_bytes, chunks = 4 * 1024**2, range(16)
    with ThreadPoolExecutor(16) as threads, volume.open("r+b", buffering=0) as file:

        def write(chunk: int) -> int:
            return os.pwrite(file.fileno(), b"cut" * 1000, chunk * chunk_bytes + 8192)

        def read(chunk: int) -> int:
            return len(os.pread(file.fileno(), 4096, chunk * chunk_bytes))

        log = records.file_of(hosts.directory("sdc1"), str(hosts.mountpoint("sdc1")), "log")
        assert list(threads.map(write, chunks)) == [3000] * 16
        hosts.cut("sdc1", "sds1")
        writes = [threads.submit(write, chunk) for chunk in chunks]
        poll_until(lambda: "lost the connection to an SDS" in log.read_text(), 8, "the connection given up")
        waiting = [write for write in writes if not write.done()]
        assert 0 < len(waiting) < 16
        assert [read(chunk) for chunk in chunks] == [4096] * 16
        hosts.heal()
        assert [write.result(5) for write in writes] == [3000] * 16


def test_nothing_is_left_of_a_run_that_is_terminated(name: str, tmp_path: Path) -> None:
    """Goal: SIGTERM in the middle of a fault: no process, mount, namespace or directory stays."""
    journal = tmp_path / "journal"
    argv = [sys.executable, "-m", "tools.soak.faults", "--namespaces", "--name", name, "--journal", str(journal)]
    argv += ["--kinds", "freeze-sds", "--sds", "2", "--seed", "5"]
    with running(argv, cwd=ROOT, stdout=subprocess.DEVNULL) as run:

        def is_at_it() -> bool:
            assert run.poll() is None
            return journal.exists() and '"fault"' in journal.read_text()

        poll_until(is_at_it, timeout_seconds=60, what="a fault")
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 143
    base = demo.directory_of(name)
    assert not base.exists()
    assert name not in network.networks()
    assert not [path for path in mountpoints() if path.startswith(str(base))]
