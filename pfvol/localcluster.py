"""A whole cluster on this machine, one process per node: ``mdm1`` with the MDM alone, ``sds1``.. with one SDS each.

Owns a data directory::

    cluster.json       what there is: nodes, ports, processes and what ``up`` needs to come back
    secret             the cluster secret (0600)
    lock               held while a command changes any of this
    mounts/            who has mounted from it (``pfvol.sdc.records``)
    NODE/node.toml     the node's configuration
    NODE/log           its output; everything else in NODE/ is the node's

Every function is synchronous: ``cluster`` commands, ``pfvol mount`` and tests call it. The nodes outlive the caller.
Promises: ``up`` is idempotent and returns when every SDS is UP, or stops what it started and says why; no process is
signalled that is not a node of this very directory; a directory that is not what it must be is refused before anything
in it is touched.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import secrets
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pfvol
from pfvol import childprocess
from pfvol.client import Client, Endpoint
from pfvol.config import check_name
from pfvol.constants import DEVICE_SIZE_BYTES_DEFAULT, DEVICES_PER_SDS_DEFAULT, STATE_VERSION
from pfvol.errors import (
    ConfigError,
    ConflictError,
    DeviceError,
    Error,
    InvalidError,
    NotFoundError,
    TimedOutError,
    UnreachableError,
)
from pfvol.sdc import records

Document = dict[str, Any]

HOST = "127.0.0.1"
MDM_NODE = "mdm1"
PROTECTION_DOMAIN = "default"
POOL = "default"
COPIES = 2
SDS_COUNT_MAX = 64
DEVICES_MAX = 64
START_TIMEOUT_SECONDS = 60.0
STOP_GRACE_SECONDS = 20.0
LOCK_TIMEOUT_SECONDS = 90.0
PORT_TIMEOUT_SECONDS = 2.0  # what the kernel may need to end a node that was killed, and to free its port
POLL_SECONDS = 0.03
# Below what the kernel hands to outgoing connections, so that a port is still free when the cluster comes back.
PORT_RANGE = range(20000, 32000)
# What an ``up`` that was killed before it had written its plan may have left.
_BEFORE_THE_DOCUMENT = {"lock", "mounts", "secret", "secret.new", "cluster.json.new"}


# -- what callers use


def up(
    data_dir: Path,
    *,
    sds: int = 3,
    fault_sets: int = 0,
    devices: int = DEVICES_PER_SDS_DEFAULT,
    device_size_bytes: int = DEVICE_SIZE_BYTES_DEFAULT,
    bare: bool = False,
) -> Document:
    """Makes the cluster of ``data_dir``, or brings the one that is there back with its ports, ids and shape.

    ``fault_sets``: the SDSs are spread over fs1..fsN in turn, 0 = none. ``bare``: no protection domain, pool or SDS is
    made in the MDM; the SDSs wait to be added. The shape is given once: for a cluster that exists it is ignored.

    Raises ConfigError for a directory that holds something else, ConflictError when a port is taken, and
    UnreachableError or TimedOutError with the node's last words when one does not start.
    """
    _check_shape(sds, fault_sets, devices, device_size_bytes)
    data_dir = data_dir.absolute()
    existing = _load(data_dir, missing_ok=True)
    if existing is None:
        _make_data_dir(data_dir)
    with _lock(data_dir):
        document = _load(data_dir, missing_ok=True)
        if document is None:
            document = _plan(data_dir, sds, fault_sets, devices, device_size_bytes, bare)
            _save(document)
        return _start(document, document["nodes"])


def down(data_dir: Path) -> Document:
    """Stops every node, the MDM first; the data stays. ConflictError, naming them, while there are mounts of it."""
    with _existing(data_dir) as document:
        mounts = mounts_of(data_dir)
        if mounts:
            raise ConflictError(
                f"still mounted: {', '.join(mounts)}; run pfvol umount MOUNTPOINT first", mountpoints=mounts
            )
        _stop(document, document["nodes"])
        return document


def status(data_dir: Path) -> Document:
    """``cluster.json`` with a ``state`` per node (UP, DOWN, STOPPED) and one over all (DEGRADED when they differ)."""
    document = _require(data_dir)
    answers: dict[str, str] | None = None
    if _alive(document, _node(document, MDM_NODE)):
        try:
            with _client(document) as client:
                answers = {sds["name"]: sds["state"] for sds in client.get("/sds/list")}
        except Error:
            answers = None
    for node in document["nodes"]:
        node["state"] = _node_state(document, node, answers)
    states = {node["state"] for node in document["nodes"]}
    document["state"] = states.pop() if len(states) == 1 else "DEGRADED"
    return document


def restart(data_dir: Path, node: str | None = None) -> Document:
    """Stops and starts every node, or one. Mounts stay: their IO waits."""
    with _existing(data_dir) as document:
        chosen = document["nodes"] if node is None else [_node(document, node)]
        _stop(document, chosen)
        return _start(document, chosen)


def add_node(
    data_dir: Path, name: str, capabilities: Sequence[str] = ("sds",), fault_set: str | None = None
) -> Document:
    """One more SDS node of the cluster's shape; unless bare, it joins the default protection domain and pool."""
    if tuple(capabilities) != ("sds",):
        raise InvalidError(
            "a local cluster has one MDM, and each mount is its own SDC: a node that is added can only be sds"
        )
    check_name(name)
    with _existing(data_dir) as document:
        if any(node["name"] == name for node in document["nodes"]):
            raise ConflictError(f"there is a node {name} already")
        if not _alive(document, _node(document, MDM_NODE)):
            raise ConflictError("the cluster is down: pfvol cluster up starts it")
        taken = {port for node in document["nodes"] for port in _ports(node)}
        node = _plan_node(document, name, "sds", _free_ports(1, taken), fault_set)
        document["nodes"].append(node)
        _save(document)
        try:
            return _start(document, [node])
        except BaseException:
            document["nodes"].remove(node)
            _save(document)
            raise


def start_node(data_dir: Path, name: str) -> Document:
    with _existing(data_dir) as document:
        return _start(document, [_node(document, name)])


def stop_node(data_dir: Path, name: str) -> Document:
    """Stops one node cleanly."""
    with _existing(data_dir) as document:
        _stop(document, [_node(document, name)])
        return document


def kill_node(data_dir: Path, name: str | None = None) -> Document:
    """SIGKILL for one node, or for all of them at once: what a crash looks like. For tests and demonstrations."""
    with _existing(data_dir) as document:
        nodes = document["nodes"] if name is None else [_node(document, name)]
        childprocess.kill([identity for node in nodes if (identity := _identity(document, node))])
        _forget_processes(document, nodes)
        return document


def mounts_of(data_dir: Path) -> list[str]:
    """Mountpoints, on this machine, of the SDCs that use the cluster of ``data_dir``."""
    return [record.mountpoint for record in records.live(data_dir.absolute())]


# -- the shape


def _check_shape(sds: int, fault_sets: int, devices: int, device_size_bytes: int) -> None:
    if not 1 <= sds <= SDS_COUNT_MAX:
        raise InvalidError(f"a local cluster has 1 to {SDS_COUNT_MAX} SDSs, not {sds}")
    if fault_sets and not 2 <= fault_sets <= sds:
        raise InvalidError(f"{sds} SDSs can be spread over 2 to {sds} fault sets, not {fault_sets}")
    if not 1 <= devices <= DEVICES_MAX:
        raise InvalidError(f"an SDS has 1 to {DEVICES_MAX} devices, not {devices}")
    if device_size_bytes < 64 * 1024**2:
        raise InvalidError("a device has at least 64 MiB")


def _plan(data_dir: Path, sds: int, fault_sets: int, devices: int, device_size_bytes: int, bare: bool) -> Document:
    document: Document = {
        "version": STATE_VERSION,
        "data_dir": str(data_dir),
        "mdm": "",
        "control_address": "",
        "api": "",
        "token": "",
        "bare": bare,
        "devices": devices,
        "device_size_bytes": device_size_bytes,
        "provisioned": False,
        "nodes": [],
    }
    ports = _free_ports(2 + sds, set())
    mdm = _plan_node(document, MDM_NODE, "mdm", ports[:2], None)
    document["nodes"].append(mdm)
    document["mdm"] = document["control_address"] = mdm["control_address"]
    document["api"] = f"http://{HOST}:{ports[1]}"
    for index in range(sds):
        fault_set = f"fs{index % fault_sets + 1}" if fault_sets else None
        document["nodes"].append(
            _plan_node(document, f"sds{index + 1}", "sds", ports[2 + index : 3 + index], fault_set)
        )
    return document


def _plan_node(document: Document, name: str, capability: str, ports: Sequence[int], fault_set: str | None) -> Document:
    is_sds = capability == "sds"
    return {
        "name": name,
        "pid": None,
        "start_ticks": None,
        "capabilities": [capability],
        "control_address": document["mdm"] if is_sds else f"{HOST}:{ports[0]}",
        "data_address": f"{HOST}:{ports[0]}" if is_sds else None,
        "api_address": None if is_sds else f"{HOST}:{ports[1]}",
        "data_dir": str(Path(document["data_dir"]) / name),
        "sds": name if is_sds else None,
        "fault_set": fault_set,
    }


def _free_ports(count: int, taken: set[int]) -> list[int]:
    """Ports that nobody listens on now. Each is bound by its node only later: who finds it taken says so."""
    ports: list[int] = []
    for port in random.sample(PORT_RANGE, len(PORT_RANGE)):
        if len(ports) == count:
            return ports
        if port not in taken and _port_free(port):
            ports.append(port)
    raise ConflictError(f"no {count} free ports between {PORT_RANGE.start} and {PORT_RANGE.stop - 1}")


def _port_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the nodes bind: connections of the last run that linger in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def _ports(node: Document) -> list[int]:
    own = [node["data_address"]] if node["sds"] else [node["control_address"], node["api_address"]]
    return [int(address.rpartition(":")[2]) for address in own]


# -- the directory


def _make_data_dir(data_dir: Path) -> None:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        strange = sorted(set(os.listdir(data_dir)) - _BEFORE_THE_DOCUMENT)
    except OSError as error:
        raise ConfigError(f"{data_dir} cannot be used as a data directory: {error.strerror}") from error
    # Asked after the listing: another command may be making the cluster now, and the document comes before the rest.
    if strange and not (data_dir / "cluster.json").exists():
        raise ConfigError(
            f"{data_dir} holds {strange[0]!r} but no cluster.json: it is no pfvol data directory, or a part of it was "
            "deleted; restore cluster.json or choose another directory with --data-dir"
        )


def _load(data_dir: Path, *, missing_ok: bool = False) -> Document | None:
    """``cluster.json``, checked against the directory; None when there is none and that is all right."""
    path = data_dir.absolute() / "cluster.json"
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        if missing_ok:
            return None
        raise NotFoundError(f"no cluster in {data_dir}: pfvol cluster up makes one") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; choose another --data-dir") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): restore it or choose another --data-dir") from error
    _check_document(path, document)
    return document  # type: ignore[no-any-return]


def _check_document(path: Path, document: Any) -> None:
    if not isinstance(document, dict) or not isinstance(document.get("version"), int):
        raise ConfigError(f"{path} is no document of pfvol's: restore it or choose another --data-dir")
    if document["version"] != STATE_VERSION:
        raise ConfigError(
            f"{path} has version {document['version']}, this pfvol ({pfvol.__version__}) reads {STATE_VERSION}: "
            "use the pfvol that made it, or another --data-dir"
        )
    keys = {"data_dir", "mdm", "api", "token", "bare", "devices", "device_size_bytes", "provisioned", "nodes"}
    missing = sorted(keys - set(document))
    if missing:
        raise ConfigError(f"{path} has no {missing[0]!r}: restore it or choose another --data-dir")
    if document["data_dir"] != str(path.parent):
        raise ConfigError(f"{path} belongs to {document['data_dir']}: a data directory cannot be moved or copied")
    if document["provisioned"]:
        needed = [path.parent / "secret", *(Path(node["data_dir"]) / "node.toml" for node in document["nodes"])]
        gone = [str(item) for item in needed if not item.exists()]
        if gone:
            raise ConfigError(
                f"{gone[0]} is missing, part of the cluster was deleted: restore it or choose another --data-dir"
            )


def _require(data_dir: Path) -> Document:
    document = _load(data_dir)
    assert document is not None
    return document


def _save(document: Document) -> None:
    """Atomic and durable; 0600, as the token is in it."""
    _write_private(Path(document["data_dir"]) / "cluster.json", json.dumps(document, indent=2) + "\n")


def _write_private(path: Path, text: str | bytes) -> None:
    content = text.encode() if isinstance(text, str) else text
    temporary = path.with_name(path.name + ".new")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def _existing(data_dir: Path) -> Iterator[Document]:
    _require(data_dir)
    with _lock(data_dir.absolute()):
        yield _require(data_dir)


@contextmanager
def _lock(data_dir: Path) -> Iterator[None]:
    """One command at a time changes a cluster; the kernel drops the lock with its holder."""
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _poll(
            lambda: _try_lock(descriptor),
            LOCK_TIMEOUT_SECONDS,
            ConflictError(f"another pfvol command is working on {data_dir}: try again when it has ended"),
        )
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# -- processes


def _start(document: Document, nodes: Sequence[Document]) -> Document:
    """Starts those of ``nodes`` that do not run and waits until they serve; on failure stops what it started."""
    stopped = [node for node in nodes if not _alive(document, node)]
    _check_ports(stopped)
    try:
        for node in sorted(stopped, key=lambda node: node["name"] != MDM_NODE):
            _spawn(document, node)
            if node["name"] == MDM_NODE:
                _await_mdm(document, node)
        _save(document)
        sds_nodes = [node for node in nodes if node["sds"]]
        if sds_nodes and not document["bare"]:
            _provision(document, sds_nodes)
            _await_sds(document, sds_nodes)
        document["provisioned"] = True
        _save(document)
    except BaseException:
        _stop(document, stopped)
        raise
    return document


def _check_ports(nodes: Sequence[Document]) -> None:
    for node in nodes:
        for port in _ports(node):
            taken = ConflictError(
                f"port {port} of node {node['name']} is in use by another program: stop it (ss -ltnp shows it)",
                node=node["name"],
                port=port,
            )
            _poll(partial(_port_free, port), PORT_TIMEOUT_SECONDS, taken)


def _spawn(document: Document, node: Document) -> None:
    directory = Path(node["data_dir"])
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        secret = Path(document["data_dir"]) / "secret"
        if not secret.exists():
            _write_private(secret, secrets.token_bytes(32))
        _write_private(directory / "node.toml", _configuration(document, node))
    except OSError as error:
        raise ConfigError(f"{error.filename or directory} cannot be written: {error.strerror}") from error
    argv = [sys.executable, "-m", "pfvol.node", "--name", node["name"]]
    argv += ["--capabilities", ",".join(node["capabilities"]), "--config", str(directory / "node.toml")]
    identity = childprocess.start_detached(argv, directory / "log", _environment())
    node["pid"], node["start_ticks"] = identity
    # At once, so that a caller that is killed leaves nothing behind that nobody knows of.
    _save(document)


def _configuration(document: Document, node: Document) -> str:
    """The node's TOML (a JSON string is a TOML string)."""
    lines = [
        "[node]",
        f"name = {json.dumps(node['name'])}",
        f"capabilities = {json.dumps(node['capabilities'])}",
        f"data_dir = {json.dumps(document['data_dir'])}",
        f"bind = {json.dumps(HOST)}",
        "[cluster]",
        f"mdm = {json.dumps(document['mdm'])}",
        f"secret_file = {json.dumps(str(Path(document['data_dir']) / 'secret'))}",
    ]
    if node["sds"]:
        lines += ["[sds]", f"data_port = {_ports(node)[0]}"]
    else:
        lines += ["[mdm]", f"control_port = {_ports(node)[0]}", f"api_port = {_ports(node)[1]}"]
    return "\n".join(lines) + "\n"


def _environment() -> dict[str, str]:
    """Ours, less pfvol's own settings; a checkout that is not installed stays importable from another directory."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PFVOL_")}
    root = str(Path(pfvol.__file__).resolve().parent.parent)
    paths = [os.path.abspath(path) for path in environment.pop("PYTHONPATH", "").split(os.pathsep) if path]
    if root not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *paths}:
        paths.insert(0, root)
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment


def _identity(document: Document, node: Document) -> childprocess.Identity | None:
    return childprocess.find(node["pid"], node["start_ticks"], str(Path(node["data_dir"]) / "node.toml"))


def _alive(document: Document, node: Document) -> bool:
    return _identity(document, node) is not None


def _stop(document: Document, nodes: Sequence[Document]) -> None:
    """The MDM first: with nobody to ask, the SDSs that are left do not have those left out that have gone already."""
    for is_sds in (False, True):
        group = [node for node in nodes if bool(node["sds"]) is is_sds]
        childprocess.stop([identity for node in group if (identity := _identity(document, node))], STOP_GRACE_SECONDS)
    _forget_processes(document, nodes)


def _forget_processes(document: Document, nodes: Sequence[Document]) -> None:
    for node in nodes:
        node["pid"] = node["start_ticks"] = None
    _save(document)


# -- the cluster's objects


def _client(document: Document) -> Client:
    return Client(Endpoint(document["api"], document["token"]))


def _await_mdm(document: Document, node: Document) -> None:
    """Until the API answers; from then on the token is in the document."""
    host, port = HOST, _ports(node)[1]

    def listening() -> bool:
        _check_running(document, [node])
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex((host, port)) == 0

    _poll(listening, START_TIMEOUT_SECONDS, lambda: _not_started(node))
    document["token"] = (Path(node["data_dir"]) / "token").read_text().strip()


def _provision(document: Document, nodes: Sequence[Document]) -> None:
    """Protection domain, fault sets, SDSs, pool: each is made unless it is there; an interrupted ``up`` goes on.

    When an SDS was added the pool grows to all there is: half of it, as each byte is kept twice.
    """
    pd = PROTECTION_DOMAIN
    with _client(document) as client:
        if pd not in _names(client, "/pd/list"):
            client.post("/pd/create", name=pd)
        there = _names(client, "/fault-set/list")
        for name in sorted({node["fault_set"] for node in nodes if node["fault_set"]} - there):
            client.post("/fault-set/create", pd_id=pd, name=name)
        there = _names(client, "/sds/list")
        new = [node for node in nodes if node["sds"] not in there]
        capacity_bytes = document["devices"] * document["device_size_bytes"]
        for node in new:
            body = {"name": node["sds"], "node": node["name"], "fault_set_id": node["fault_set"]}
            client.post("/sds/add", pd_id=pd, capacity_bytes=capacity_bytes, **body)
        net_bytes = sum(sds["total_capacity_bytes"] for sds in client.get("/sds/list", pd_id=pd)) // COPIES
        pools = [pool for pool in client.get("/pool/list", pd_id=pd) if pool["name"] == POOL]
        if not pools:
            client.post("/pool/create", pd_id=pd, name=POOL, policy="two_copies", capacity_bytes=net_bytes)
        elif new:
            client.patch(f"/pool/{pools[0]['id']}", capacity_bytes=net_bytes)


def _names(client: Client, route: str) -> set[str]:
    return {item["name"] for item in client.get(route)}


def _await_sds(document: Document, nodes: Sequence[Document]) -> None:
    mdm = _node(document, MDM_NODE)
    waiting = {node["sds"]: node for node in nodes}

    def serving() -> bool:
        _check_running(document, [mdm, *nodes])
        with suppress(UnreachableError):
            for sds in client.get("/sds/list"):
                # An MDM that has just started takes for UP what was so before.
                if sds["name"] in waiting and sds["state"] == "UP" and sds["serving"]:
                    del waiting[sds["name"]]
                elif sds["name"] in waiting and sds["faults"]["failed"] and sds["connected"]:
                    del waiting[sds["name"]]  # as it was told to: `pfvol sds recover` ends that
                elif sds["name"] in waiting and sds["failed_devices"]:
                    # It would wait for ever: without what the device held it must not serve.
                    raise DeviceError(f"{sds['name']} does not serve: {sds['failed_devices'][0]['message']}")
        return not waiting

    with _client(document) as client:
        _poll(serving, START_TIMEOUT_SECONDS, lambda: _not_started(*waiting.values()))


def _check_running(document: Document, nodes: Sequence[Document]) -> None:
    for node in nodes:
        if not _alive(document, node):
            raise UnreachableError(f"node {node['name']} ended; {_last_words(node)}", node=node["name"])


def _not_started(*nodes: Document) -> Error:
    names = ", ".join(node["name"] for node in nodes)
    return TimedOutError(f"{names} did not serve within {START_TIMEOUT_SECONDS:.0f} s; {_last_words(nodes[0])}")


def _last_words(node: Document) -> str:
    path = Path(node["data_dir"]) / "log"
    tail = childprocess.log_tail(path, 1)
    return f"the last line of {path}: {tail}" if tail else f"{path} is empty"


def _node(document: Document, name: str) -> Document:
    for node in document["nodes"]:
        if node["name"] == name:
            return node  # type: ignore[no-any-return]
    raise NotFoundError(f"no node {name}: there are {', '.join(node['name'] for node in document['nodes'])}")


def _node_state(document: Document, node: Document, answers: dict[str, str] | None) -> str:
    if not _alive(document, node):
        return "STOPPED"
    if not node["sds"]:
        return "DOWN" if answers is None else "UP"
    # A bare cluster's SDS that nobody has added yet is up as far as it can be.
    return "DOWN" if answers is None else answers.get(node["sds"], "UP" if document["bare"] else "DOWN")


def _poll(condition: Callable[[], bool], timeout_seconds: float, error: Error | Callable[[], Error]) -> None:
    """Until the condition holds. The error may be a function, for what is only known at the end."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise error if isinstance(error, Error) else error()
        time.sleep(POLL_SECONDS)
