"""A cluster on several "hosts" of one machine: network namespaces that can be cut from each other, real daemons inside.

    python -m tools.demo.hosts up [--sds 3 --sdcs 2]     hosts mdm, sds1.., sdc1.., each with one node
    python -m tools.demo.hosts run sdc1 pfvol vol list    a command on a host
    python -m tools.demo.hosts mount sdc1 [-o direct]     its volumes as files
    python -m tools.demo.hosts cut sds1 sds2             in both directions (--one-way: sds2 hears nothing from sds1)
    python -m tools.demo.hosts cut sds1                  from all other hosts
    python -m tools.demo.hosts heal                      everybody hears everybody
    python -m tools.demo.hosts kill|freeze|thaw|start sds1
    python -m tools.demo.hosts status
    python -m tools.demo.hosts clean                     all of it gone (--all: of every such cluster on this machine)

``--name`` names the cluster: one machine may have several. With ``--loopback`` the hosts are mere addresses, which
needs no root but cannot be cut. Soak and tests use ``Hosts``. Promises: ``clean`` finds everything by the name alone,
also when whoever made it was killed half-way.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pfvol import childprocess
from pfvol.client import Client, Endpoint
from pfvol.constants import API_PORT_DEFAULT, CONTROL_PORT_DEFAULT
from pfvol.errors import Error, UnreachableError
from pfvol.sdc import launch
from pfvol.sdc.mount import mount_table
from tools.demo import network as networks
from tools.demo.network import Loopback, Namespaces, Network, NetworkError

MIB = 1024**2
MDM = "mdm"
POOL = "default"
PD = "default"
START_SECONDS = 60.0
POLL_SECONDS = 0.05
COMMAND_SECONDS = 120.0
DIRECTORY_PREFIX = "pfvol-hosts-"


class HostsError(Exception):
    """The hosts do not do what they are to do."""


@dataclass(frozen=True)
class Shape:
    """How many there are of what."""

    sds: int = 3
    sdcs: int = 2
    sds_bytes: int = 1024 * MIB
    fault_sets: int = 0

    @property
    def nodes(self) -> list[str]:
        """The hosts with a daemon of the cluster, the MDM's first."""
        return [MDM, *self.servers]

    @property
    def servers(self) -> list[str]:
        return [f"sds{number}" for number in range(1, self.sds + 1)]

    @property
    def clients(self) -> list[str]:
        return [f"sdc{number}" for number in range(1, self.sdcs + 1)]


def directory_of(name: str) -> Path:
    return Path(tempfile.gettempdir(), f"{DIRECTORY_PREFIX}{name}")


class Hosts:
    """One cluster: ``make`` or ``attach``, and in the end ``clean(name)``."""

    program = "pfvol.node"  # that each node is; tests have others, which take the same words

    def __init__(self, name: str, shape: Shape, network: Network) -> None:
        self.name = name
        self.shape = shape
        self.network = network
        self.base = directory_of(name)
        self.kept = False  # set by who wants to look at it: `cluster` then cleans up nothing
        self._processes: dict[str, childprocess.Identity] = {}

    @classmethod
    def make(cls, name: str, shape: Shape, *, loopback: bool = False) -> Hosts:
        """The network and the directories; nothing runs yet. Where it fails nothing is left."""
        base = directory_of(name)
        try:
            base.mkdir(mode=0o700)
        except FileExistsError:
            raise HostsError(f"{base} is there already: `clean` it, or choose another --name") from None
        names = [*shape.nodes, *shape.clients]
        try:
            hosts = cls(name, shape, Loopback.make(names) if loopback else Namespaces.make(name, names))
            hosts._make_directories(loopback)
        except BaseException:
            clean(name)
            raise
        return hosts

    def _make_directories(self, loopback: bool) -> None:
        document = {"shape": asdict(self.shape), "loopback": loopback, "addresses": self.network.addresses}
        (self.base / "hosts.json").write_text(json.dumps(document, indent=2) + "\n")
        secret = secrets.token_bytes(32)
        for host in self.network.addresses:
            self.directory(host).mkdir(mode=0o700)
            self._write_private(self.directory(host) / "secret", secret)
        for node in self.shape.nodes:
            (self.directory(node) / node).mkdir(mode=0o700)
            self._write_private(self.configuration(node), self._configuration(node).encode())
        for sdc in self.shape.clients:
            self.mountpoint(sdc).mkdir()

    @classmethod
    def attach(cls, name: str) -> Hosts:
        """One that ``make`` has made, perhaps in another process."""
        try:
            document = json.loads((directory_of(name) / "hosts.json").read_text())
        except FileNotFoundError:
            raise HostsError(f"there are no hosts named {name}: `up` makes them") from None
        addresses = document["addresses"]
        network = Loopback(addresses) if document["loopback"] else Namespaces(name, addresses)
        return cls(name, Shape(**document["shape"]), network)

    # -- where things are

    def directory(self, host: str) -> Path:
        return self.base / host

    def configuration(self, node: str) -> Path:
        return self.directory(node) / "node.toml"

    def log(self, host: str) -> Path:
        return self.directory(host) / "log"

    def mountpoint(self, sdc: str) -> Path:
        return self.directory(sdc) / "mnt"

    @property
    def control_address(self) -> str:
        return f"{self.network.addresses[MDM]}:{CONTROL_PORT_DEFAULT}"

    @property
    def api(self) -> str:
        return f"http://{self.network.addresses[MDM]}:{API_PORT_DEFAULT}"

    @property
    def token(self) -> str:
        return (self.directory(MDM) / MDM / "token").read_text().strip()

    def client(self, timeout_seconds: float = COMMAND_SECONDS) -> Client:
        """The REST client (a context manager)."""
        try:
            return Client(Endpoint(self.api, self.token), timeout_seconds=timeout_seconds)
        except FileNotFoundError as error:
            raise UnreachableError("the MDM has not started yet") from error

    def environment(self, host: str) -> dict[str, str]:
        """For commands on a host: ``pfvol`` finds the cluster."""
        found = dict(launch.environment()) | {"PFVOL_API": self.api, "PFVOL_DATA_DIR": str(self.directory(host))}
        with suppress(FileNotFoundError):
            found["PFVOL_TOKEN"] = self.token
        return found

    # -- the cluster

    def begin(self) -> None:
        """Starts every node and makes protection domain, SDSs and pool; returns when all SDSs serve."""
        self.start(*self.shape.nodes)
        self.await_answer()
        with self.client() as client:
            client.post("/pd/create", name=PD)
            sets = [f"fs{number}" for number in range(1, self.shape.fault_sets + 1)]
            for name in sets:
                client.post("/fault-set/create", pd_id=PD, name=name)
            for index, sds in enumerate(self.shape.servers):
                fault_set = sets[index % len(sets)] if sets else None
                body = {"name": sds, "node": sds, "fault_set_id": fault_set}
                client.post("/sds/add", pd_id=PD, capacity_bytes=self.shape.sds_bytes, **body)
        self.await_servers()
        with self.client() as client:
            net_bytes = self.shape.sds_bytes * self.shape.sds // 2
            client.post("/pool/create", pd_id=PD, name=POOL, policy="two_copies", capacity_bytes=net_bytes)
            for sdc in self.shape.clients:
                client.post("/sdc/add", name=sdc)

    def volume(self, name: str, size_bytes: int, sdcs: Sequence[str], *, thick: bool = False) -> None:
        provisioning = "thick" if thick else "thin"
        with self.client() as client:
            client.post("/vol/create", pool_id=POOL, name=name, size_bytes=size_bytes, provisioning=provisioning)
            for sdc in sdcs:
                client.post("/vol/map", volume_id=name, sdc_id=sdc, access_mode="readWrite")

    def mount(self, sdc: str, *options: str) -> None:
        words = ["--mdm", self.control_address, "mount", str(self.mountpoint(sdc)), "--sdc", sdc]
        words += ["-o", ",".join(options)] if options else []
        self.pfvol(sdc, *words)

    def umount(self, sdc: str) -> None:
        self.pfvol(sdc, "umount", str(self.mountpoint(sdc)))

    def pfvol(self, host: str, *arguments: str) -> str:
        """The command line on a host; what it said. HostsError when it fails."""
        argv = [sys.executable, "-m", "pfvol.cli", "--data-dir", str(self.directory(host)), *arguments]
        done = subprocess.run(
            self.network.argv(host, argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment(host),
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if done.returncode:
            raise HostsError(f"pfvol {' '.join(arguments)} on {host} failed: {done.stderr.strip()}")
        return done.stdout

    def health(self) -> str:
        """The cluster's health with its reasons; ``UNREACHABLE`` while the MDM does not answer."""
        try:
            with self.client(timeout_seconds=2.0) as client:
                status = client.get("/system/status")
                down = [sds["name"] for sds in client.get("/sds/list") if not _serves(sds)]
        except Error:
            return "UNREACHABLE"
        reasons = [*status["reasons"], *([f"not up: {', '.join(down)}"] if down else [])]
        if status["health"] == "OK" and not down:
            return "OK"
        return f"{status['health']} ({'; '.join(map(str, reasons))})"

    def await_health(self, timeout_seconds: float) -> float:
        """Waits until all is well; the seconds it took. HostsError with what is not, at the deadline."""
        begun = time.monotonic()
        while (health := self.health()) != "OK":
            if time.monotonic() > begun + timeout_seconds:
                raise HostsError(f"after {timeout_seconds:.0f} s health is {health}")
            time.sleep(POLL_SECONDS)
        return time.monotonic() - begun

    def await_answer(self) -> None:
        self._await(lambda: not self.health().startswith("UNREACHABLE"), [MDM])

    def await_servers(self) -> None:
        def serving() -> bool:
            with suppress(UnreachableError), self.client() as client:
                return all(_serves(sds) for sds in client.get("/sds/list"))
            return False

        self._await(serving, self.shape.servers)

    def _await(self, condition: Callable[[], bool], nodes: Sequence[str]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            ended = [node for node in nodes if self.process(node) is None]
            if ended or time.monotonic() > deadline:
                log = childprocess.log_tail(self.log(ended[0] if ended else nodes[0]))
                what = f"{', '.join(ended)} ended" if ended else f"{', '.join(nodes)} did not serve in time"
                raise HostsError(f"{what}; the end of the log:\n{log}")
            time.sleep(POLL_SECONDS)

    # -- processes

    def start(self, *nodes: str) -> None:
        """Starts those that do not run; they come up by themselves."""
        for node in nodes:
            if self.process(node) is None:
                words = [sys.executable, "-m", self.program, "--name", node, "--capabilities", self._capability(node)]
                argv = self.network.argv(node, [*words, "--config", str(self.configuration(node))])
                self._processes[node] = childprocess.start_detached(argv, self.log(node), launch.environment())

    def process(self, host: str) -> childprocess.Identity | None:
        """The daemon of a host: its node, or for an SDC what serves its mount."""
        known = self._processes.get(host)
        if known is None or not childprocess.is_alive(known):
            found = self._find(host)
            if found is None:
                self._processes.pop(host, None)
                return None
            self._processes[host] = known = found
        return known

    def _find(self, host: str) -> childprocess.Identity | None:
        if host in self.shape.clients:
            return next(iter(launch.daemons_of(self.directory(host), str(self.mountpoint(host)))), None)
        pids = childprocess.find_by_argument(str(self.configuration(host)))
        return next((found for pid in pids if (found := childprocess.identify(pid))), None)

    def kill(self, *hosts: str) -> None:
        childprocess.kill([process for host in hosts if (process := self.process(host))])

    def freeze(self, *hosts: str) -> None:
        self._signal(hosts, signal.SIGSTOP)

    def thaw(self, *hosts: str) -> None:
        self._signal(hosts, signal.SIGCONT)

    def stop(self, *nodes: str) -> None:
        """Ends nodes in good order."""
        childprocess.stop([process for node in nodes if (process := self.process(node))], 20.0)

    def _signal(self, hosts: Sequence[str], number: signal.Signals) -> None:
        for host in hosts:
            if process := self.process(host):
                childprocess.send_signal(process, number)

    # -- links

    def cut(self, one: str, *others: str, one_way: bool = False) -> None:
        """``others`` (none: all other hosts) no longer hear ``one``, nor, unless ``one_way``, it them."""
        others = others or tuple(host for host in self.network.addresses if host != one)
        self.network.cut(one, others)
        if not one_way:
            for other in others:
                self.network.cut(other, [one])

    def heal(self) -> None:
        self.network.heal()

    # -- files

    def _capability(self, node: str) -> str:
        return "mdm" if node == MDM else "sds"

    def _configuration(self, node: str) -> str:
        """The node's TOML (a JSON string is a TOML string)."""
        lines = ["[node]", f"name = {json.dumps(node)}", f"capabilities = [{json.dumps(self._capability(node))}]"]
        lines += [f"data_dir = {json.dumps(str(self.directory(node)))}"]
        lines += [f"bind = {json.dumps(self.network.addresses[node])}"]
        lines += ["[cluster]", f"mdm = {json.dumps(self.control_address)}"]
        return "\n".join(lines) + "\n"

    @staticmethod
    def _write_private(path: Path, content: bytes) -> None:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(content)


def clean(name: str) -> bool:
    """Ends and removes everything that has this name, whatever state it is in; False when there was nothing."""
    with _undisturbed():
        base = directory_of(name)
        found = base.exists()
        _kill_users(base)
        for entry in mount_table():
            if entry.mountpoint.startswith(f"{base}/"):
                subprocess.run(["umount", "-l", entry.mountpoint], check=False, capture_output=True)
        found = bool(networks.remove(name)) or found
        if not any(entry.mountpoint.startswith(f"{base}/") for entry in mount_table()):
            shutil.rmtree(base, ignore_errors=True)
        return found


def _kill_users(base: Path) -> None:
    """Kills the processes that have a path of ours on their command line, but for this one and who waits for it."""
    spared = {os.getpid(), os.getppid()}
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in spared:
            words = childprocess.command_line(int(entry))
            if any(word.startswith(f"{base}/") or f"={base}/" in word for word in words):
                found.append(childprocess.identify(int(entry)))
    childprocess.kill([identity for identity in found if identity])


def all_names() -> list[str]:
    directories = Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*")
    return sorted({path.name.removeprefix(DIRECTORY_PREFIX) for path in directories} | set(networks.networks()))


def _serves(sds: dict[str, Any]) -> bool:
    """An MDM that has just started takes for UP what was so before."""
    return bool(sds["state"] == "UP" and sds["serving"])


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not end the cleaning up after the first."""
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def cluster(name: str, shape: Shape, *, loopback: bool = False) -> Iterator[Hosts]:
    """Hosts with a cluster that serves, for as long as the block runs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # As Ctrl-C: what is being done is left, and cleaned up.
    hosts = Hosts.make(name, shape, loopback=loopback)
    try:
        hosts.begin()
        yield hosts
    finally:
        if hosts.kept:
            print(f"The hosts are left as they are; this ends them: python -m tools.demo.hosts --name {name} clean")
        else:
            clean(name)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return int(COMMANDS[arguments.command](arguments) or 0)
    except (HostsError, NetworkError, Error) as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hosts", description="A cluster on several hosts of this machine.")
    parser.add_argument("--name", default="demo", help="of the hosts: 1 to 11 of a-z 0-9")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="make and start them")
    up.add_argument("--sds", type=int, default=3)
    up.add_argument("--sdcs", type=int, default=2)
    up.add_argument("--sds-mib", type=int, default=1024, help="what each SDS has room for")
    up.add_argument("--fault-sets", type=int, default=0)
    up.add_argument("--loopback", action="store_true", help="addresses of the loopback instead of namespaces")
    run = commands.add_parser("run", help="run a command on a host")
    run.add_argument("host")
    run.add_argument("argv", nargs=argparse.REMAINDER)
    for verb, does in (("mount", "show the volumes mapped to SDC at a directory"), ("umount", "and take it away")):
        command = commands.add_parser(verb, help=does)
        command.add_argument("sdc")
        if verb == "mount":
            command.add_argument("-o", dest="options", default="allow_other", help="as for `pfvol mount`")
    cut = commands.add_parser("cut", help="cut a host from others (none named: from all)")
    cut.add_argument("host")
    cut.add_argument("others", nargs="*")
    cut.add_argument("--one-way", action="store_true", help="the others hear nothing from it, but it hears them")
    commands.add_parser("heal", help="undo all cuts")
    for verb, does in (("kill", "SIGKILL"), ("freeze", "SIGSTOP"), ("thaw", "SIGCONT"), ("start", "start")):
        command = commands.add_parser(verb, help=f"{does} a host's daemon")
        command.add_argument("hosts", nargs="+")
    commands.add_parser("status", help="hosts, addresses, processes, health")
    clean_up = commands.add_parser("clean", help="end and remove everything")
    clean_up.add_argument("--all", action="store_true", help="whatever its name")
    return parser


def _up(arguments: argparse.Namespace) -> int:
    shape = Shape(arguments.sds, arguments.sdcs, arguments.sds_mib * MIB, arguments.fault_sets)
    hosts = Hosts.make(arguments.name, shape, loopback=arguments.loopback)
    try:
        hosts.begin()
    except BaseException:
        clean(arguments.name)
        raise
    return _status(arguments)


def _status(arguments: argparse.Namespace) -> int:
    hosts = Hosts.attach(arguments.name)
    for host, address in hosts.network.addresses.items():
        process = hosts.process(host)
        print(f"{host:8} {address:16} {f'pid {process.pid}' if process else '-'}")
    print(f"health: {hosts.health()}; data and logs: {hosts.base}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    hosts = Hosts.attach(arguments.name)
    _check(hosts, [arguments.host])
    argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    if not argv:
        raise HostsError("run what?")
    argv = [sys.executable, "-m", "pfvol.cli", *argv[1:]] if argv[0] == "pfvol" else argv
    environment = os.environ | hosts.environment(arguments.host)
    return subprocess.run(hosts.network.argv(arguments.host, argv), env=environment, check=False).returncode


def _mount(arguments: argparse.Namespace) -> None:
    hosts = Hosts.attach(arguments.name)
    if arguments.sdc not in hosts.shape.clients:
        raise HostsError(f"{arguments.sdc} is no host for a mount: there are {', '.join(hosts.shape.clients)}")
    if arguments.command == "mount":
        hosts.mount(arguments.sdc, *arguments.options.split(","))
        print(f"mounted at {hosts.mountpoint(arguments.sdc)}")
    else:
        hosts.umount(arguments.sdc)


def _cut(arguments: argparse.Namespace) -> None:
    hosts = Hosts.attach(arguments.name)
    _check(hosts, [arguments.host, *arguments.others])
    hosts.cut(arguments.host, *arguments.others, one_way=arguments.one_way)


def _signal(arguments: argparse.Namespace) -> None:
    hosts = Hosts.attach(arguments.name)
    _check(hosts, arguments.hosts)
    if arguments.command == "start" and (clients := set(arguments.hosts) & set(hosts.shape.clients)):
        raise HostsError(f"{min(clients)} has no node of its own: `mount {min(clients)}` starts its daemon")
    getattr(hosts, arguments.command)(*arguments.hosts)


def _clean(arguments: argparse.Namespace) -> None:
    for name in all_names() if arguments.all else [arguments.name]:
        print(f"{name}: {'removed' if clean(name) else 'there was nothing'}")


def _check(hosts: Hosts, names: Sequence[str]) -> None:
    for name in names:
        if name not in hosts.network.addresses:
            raise HostsError(f"no host {name}: there are {', '.join(hosts.network.addresses)}")


COMMANDS: dict[str, Any] = {
    "up": _up,
    "run": _run,
    "mount": _mount,
    "umount": _mount,
    "cut": _cut,
    "heal": lambda arguments: Hosts.attach(arguments.name).heal(),
    **dict.fromkeys(("kill", "freeze", "thaw", "start"), _signal),
    "status": _status,
    "clean": _clean,
}

if __name__ == "__main__":
    sys.exit(main())
