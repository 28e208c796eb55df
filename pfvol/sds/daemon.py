"""The SDS role: from a data directory and an MDM's address to a storage server that serves.

Owns the order of things: port, devices, registration, engine, serving, and their end. Assumes a node that gives
configuration and says when to stop. Promises: nothing is served before the MDM has admitted the SDS and told its peers;
once it serves, the MDM may go away; a device that cannot be used never ends the process, it is reported; a clean stop
checkpoints, closes the devices clean and ends within STOP_SECONDS.

A failure on purpose ends everything but the connection to the MDM, as if the process had been killed; its end begins
everything anew, as a start does. In between the port is bound and refuses, so that it is still ours then.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import trio

from datapath.target import Target
from pfvol import __version__
from pfvol.constants import REPORT_SECONDS
from pfvol.errors import ConfigError, ConflictError, Error, InvalidError, NotFoundError, ProtocolError
from pfvol.faults import Rules, check_block
from pfvol.log import get_logger
from pfvol.node import Node
from pfvol.rpc.client import Reconnecting, Session
from pfvol.sds import acceptor
from pfvol.sds.devices import Devices, load_state, parse_specs
from pfvol.sds.faults import Faults
from pfvol.sds.peers import Identity
from pfvol.sds.server import Server

STOP_SECONDS: Final = 15.0
REJOIN_SECONDS: Final = 2.0  # for the MDM to end the session in which it ordered a failure, or its end
RECOVER_AGAIN_SECONDS: Final = 3.0  # after the end of a failure that could not be carried out
REGISTER_TIMEOUT_SECONDS: Final = 10.0

Handler = Callable[[dict[str, Any]], Awaitable[Any]]


async def run_role(node: Node, *, task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED) -> None:
    """Runs an SDS until the node stops. Started when port and devices are ours: it registers by itself from then on.

    Raises ConfigError when the port or the data directory cannot be used.
    """
    await Sds(node).run(task_status=task_status)


class Sds:
    """One storage server. ``run`` once."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._config = node.config.sds
        self._secret = node.secret()
        self._directory = node.node_dir
        self._devices = Devices(self._directory, load_state(self._directory))
        self._log = get_logger("sds")
        # A node that is the MDM too need not say where the MDM is.
        self._mdm_address = node.config.cluster.mdm or (node.config.node.bind, node.config.mdm.control_port)
        if not self._mdm_address[1]:
            raise ConfigError("[cluster] mdm is missing: the MDM's control port is not known beforehand here")
        self._data_address: tuple[str, int] = ("", 0)
        self._server: Server | None = None
        self._target: Target | None = None
        self._faults = Faults(self._directory)
        self._serving_scope: trio.CancelScope | None = None
        self._served = trio.Event()  # set when the server that ran last has ended
        self._stuck = False  # the engine does not stop
        self._failing: trio.CancelScope | None = None  # the wait for the end of a failure
        self._admitted = False
        self._registering = trio.Lock()
        self._stop = trio.Event()
        self._mdm: Reconnecting | None = None
        self._session: Session | None = None
        self._nursery: trio.Nursery | None = None
        self._sock: trio.socket.SocketType | None = None  # None: the port is not ours
        self._methods: dict[str, Handler] = {
            "map.changed": self._rpc_map_changed,
            "sds.admitted": self._rpc_admitted,
            "sds.fail": self._rpc_fail,
            "sds.recover": self._rpc_recover,
            "sds.inject": self._rpc_inject,
            "peers": self._rpc_peers,
            "ping": self._rpc_ping,
            "repair": self._rpc_repair,
            "listens": self._rpc_listens,
            "reserved": self._rpc_reserved,
            "resync": self._rpc_resync,
            "stop": self._rpc_stop,
            "verify": self._rpc_verify,
            "volume.changed": self._rpc_changed,
            "volume.deleted": self._rpc_deleted,
            "volume.revoked": self._rpc_revoked,
        }

    async def run(self, *, task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            await self._open_port()
            if self._faults.rules or self._faults.failed:
                self._log.warning("faults on purpose", **self._faults.describe())
            if not self._faults.failed:
                await self._devices.open()
            host, port = self._mdm_address
            self._mdm = Reconnecting(
                host,
                port,
                secret=self._secret,
                role="sds",
                name=self._node.name,
                handler=self._handle,
                on_connected=self._register,
            )
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._mdm.run)
                nursery.start_soon(self._report_periodically)
                self._await_end_of_failure()
                task_status.started({"data_address": list(self._data_address), "http": None})
                await self._stop_is_wanted()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._close()

    async def _open_port(self) -> None:
        """Binds the configured port, else the one of the last run, else any: who looks for us asks the MDM."""
        bind, state = self._node.config.node.bind, self._devices.state
        wanted = self._config.data_port or state.data_port
        try:
            sock = await acceptor.bind(bind, wanted)
        except ConfigError:
            if self._config.data_port or not wanted:
                raise
            sock = await acceptor.bind(bind, 0)
        port = sock.getsockname()[1]
        try:
            if port != state.data_port:
                self._devices.remember(data_port=port)
            self._data_address = (self._config.advertise or advertised(bind, self._mdm_address), port)
        except ConfigError:
            sock.close()
            raise
        self._sock = sock

    async def _stop_is_wanted(self) -> None:
        async with trio.open_nursery() as nursery:

            async def wait(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait, self._node.stopping)
            nursery.start_soon(wait, self._stop)

    async def _close(self, *, clean: bool = True) -> bool:
        """The engine first, then the devices; clean only if the engine could write its last checkpoint, and is to.

        The port is closed when the engine has stopped and not before: to the peers a port that refuses says that
        nothing is left here that could serve. False when the engine does not stop.
        """
        if self._target is not None:
            with trio.move_on_after(STOP_SECONDS) as deadline:
                stop = partial(self._target.stop, checkpoint=clean)
                await trio.to_thread.run_sync(stop, abandon_on_cancel=True)
            if deadline.cancelled_caught or self._stuck:
                self._stuck = True
                # Its thread may still use the devices: they stay as they are, the next start recovers them.
                self._log.error("the engine did not stop in time", seconds=STOP_SECONDS)
                return False
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        await self._devices.close(clean=clean)
        self._log.info("stopped", clean=clean)
        return True

    # -- failing on purpose

    async def _rpc_fail(self, params: dict[str, Any]) -> dict[str, Any]:
        seconds = None if params.get("seconds") is None else float(params["seconds"])
        await self._apart(partial(self._fail, seconds))
        return self._faults.describe()

    async def _rpc_recover(self, _params: dict[str, Any]) -> dict[str, Any]:
        await self._apart(self._recover)
        return self._faults.describe()

    async def _rpc_inject(self, params: dict[str, Any]) -> dict[str, Any]:
        asked = Rules.from_wire(params)
        places = [(int(volume), int(chunk), int(block)) for volume, chunk, block in params["corrupt"]]
        for _, chunk, block in places:
            check_block(chunk, block)
        server = self._serving() if places else None
        clear = bool(params["clear"])
        if asked or clear:
            self._faults.inject([*asked.errors.values()], [*asked.delays.values()], clear=clear)
            self._log.warning("faults of the disks on purpose", rules=self._faults.rules.texts())
        for volume, chunk, block in places:
            assert server is not None
            await server.corrupt(volume, chunk, block)
            self._faults.corrupted += 1
            self._log.warning("block corrupted on purpose", volume=volume, chunk=chunk, block=block)
        return self._faults.describe()

    async def _apart(self, work: Callable[[], Awaitable[None]]) -> None:
        """In a task of the role: who asked for it may go away, and it must not be left half-done.

        One after the other: what is looked at and changed in there is as the work before has left it.
        """
        assert self._nursery is not None
        done, refusals = trio.Event(), list[Error]()

        async def run() -> None:
            try:
                async with self._registering:
                    await work()
            except Error as error:
                refusals.append(error)
            finally:
                done.set()

        self._nursery.start_soon(run)
        await done.wait()
        if refusals:
            raise refusals[0]

    async def _fail(self, seconds: float | None) -> None:
        self._faults.fail(seconds)
        self._log.warning("fails on purpose", seconds=seconds)
        self._await_end_of_failure()
        try:
            await self._cease(clean=False)
        finally:
            self._rejoin(REJOIN_SECONDS)

    async def _recover(self) -> None:
        if self._server is not None:
            await self._check_devices(self._server.failed_devices)
        await self._begin_anew(REJOIN_SECONDS)

    async def _check_devices(self, broken: dict[int, str]) -> None:
        """Nothing that serves is given up in vain: an SDS of which a device cannot be opened serves nothing."""
        name = self._node.name
        if not broken:
            raise ConflictError(f"SDS {name} has not failed, and all its devices are in service")
        if self._faults.rules.errors:
            raise ConflictError(f"the disks of SDS {name} err on purpose: `pfvol sds inject {name} --clear` ends that")
        for index in sorted(broken):
            if reason := await self._devices.unusable(index):
                raise ConflictError(f"SDS {name} serves without device {index}, which is no better: {reason}")

    async def _cease(self, *, clean: bool) -> None:
        """Whatever serves ends, without a word to anybody. The port is bound, and refuses."""
        self._server, self._admitted = None, False  # nothing is reported before it has registered again
        with trio.CancelScope(shield=True):
            if self._serving_scope is not None:
                self._serving_scope.cancel()
                await self._served.wait()
            if not await self._close(clean=clean):
                # Nothing of it may be left. The next start finds that this SDS is to fail.
                self._stop.set()
                raise ConflictError(f"the engine of SDS {self._node.name} does not stop: its process ends instead")
            self._target = self._serving_scope = None
            self._devices = Devices(self._directory, self._devices.state)
            await self._open_port()

    async def _begin_anew(self, patience_seconds: float) -> None:
        """What a start does; the session that follows registers, and has it serve.

        Raises ConfigError when the end of a failure cannot be saved (it lasts, then), or the port is taken: then
        nothing is served, and this may be tried again.
        """
        if self._faults.failed:
            self._faults.recover()
        self._log.info("recovers")
        try:
            await self._cease(clean=True)
            await self._devices.open()
        finally:
            self._rejoin(patience_seconds)
        if self._failing is not None:
            self._failing.cancel()
            self._failing = None

    def _rejoin(self, patience_seconds: float) -> None:
        """To the MDM a new session is what a new process is. It ends the old one when it has our answer."""
        assert self._nursery is not None
        session = self._session

        async def leave() -> None:
            if session is not None:
                with trio.move_on_after(patience_seconds):
                    await session.closed.wait()
                session.close("this SDS begins anew")

        self._nursery.start_soon(leave)

    def _await_end_of_failure(self) -> None:
        assert self._nursery is not None
        if self._failing is not None:
            self._failing.cancel()
        self._failing = scope = trio.CancelScope()
        seconds = self._faults.seconds_left()

        async def wait() -> None:
            if seconds is None or not self._faults.failed:
                return
            with scope:
                await trio.sleep(seconds)
                while self._failing is scope:
                    try:
                        await self._apart(recover)
                    except Error as error:
                        self._log.error("does not recover, tried again", reason=error.message)
                        await trio.sleep(RECOVER_AGAIN_SECONDS)

        async def recover() -> None:
            if self._failing is scope:  # while it had to wait it may have been told to recover, or to fail again
                await self._begin_anew(0.0)

        self._nursery.start_soon(wait)

    # -- the MDM

    async def _register(self, session: Session) -> None:
        """On each connection to the MDM, and when it says that we have been admitted."""
        self._session = session
        async with self._registering:
            try:
                await self._introduce(session)
            except (KeyError, TypeError, ValueError) as error:
                self._log.error("not serving: the MDM's answer cannot be read", reason=repr(error))
            except (ConfigError, ProtocolError, ConflictError) as error:
                # Nothing that trying again at once could heal. The connection stays, for the MDM to show that we are
                # here.
                self._log.error("not serving", reason=error.message)

    async def _introduce(self, session: Session) -> None:
        while True:
            if self._server is not None:
                self._server.registering()
            reply = await session.call("sds.register", self._introduction(), timeout=REGISTER_TIMEOUT_SECONDS)
            if not reply["admitted"]:
                self._log.info("waiting to be added to the cluster (pfvol sds add)")
                return
            self._admitted = True
            if self._server is not None:
                self._server.registered(reply)
                return
            if self._faults.failed:
                return
            if self._devices.failed:
                # What the lost device held cannot be told from what was never written: serving the rest would serve
                # zeros.
                self._log.error("not serving: a device is out of service", devices=self._devices.failed)
                return
            if self._sock is None:
                self._log.error("not serving: it has no port (pfvol sds recover tries again)")
                return
            cluster_id, sds_id = bytes(reply["cluster_id"]), int(reply["sds_id"])
            self._devices.adopt(cluster_id, sds_id)
            missing = self._devices.missing(parse_specs(self._directory, reply["devices"]))
            if missing:
                await self._devices.make(missing)
            elif self._devices.opened:
                await self._serve(reply)
            else:
                self._log.info("waiting for devices")
                return
            # Once more: to tell of the new devices, or to hear what has changed while the engine started.

    def _introduction(self) -> dict[str, Any]:
        devices, state = self._devices, self._devices.state
        return {
            "node": self._node.name,
            "data_address": list(self._data_address),
            "http_address": None,
            "sds_id": state.sds_id,
            "cluster_id": state.cluster_id,
            "incarnation": devices.incarnation,
            "durable_incarnation": devices.durable_incarnation,
            "version": __version__,
            # None at all says that we do not serve: a part of them would be taken for the whole.
            "devices": [] if devices.failed else devices.describe(),
            "faults": self._faults.describe(),
            "unsure": devices.unsure,
        }

    async def _serve(self, reply: dict[str, Any]) -> None:
        """Starts the engine on the devices, and everything around it."""
        assert self._nursery is not None
        assert self._mdm is not None
        assert self._sock is not None
        devices, sds_id = self._devices, int(reply["sds_id"])
        identity = Identity(
            self._secret, bytes(reply["cluster_id"]), sds_id, devices.incarnation, devices.durable_incarnation
        )
        target = Target(sds_id, identity.incarnation, identity.durable_incarnation)
        for _, device in sorted(devices.opened.items()):
            target.add_device(device)
        self._target = target
        await trio.to_thread.run_sync(target.start)
        # A second descriptor: the port stays open until the engine has stopped (see _close).
        server = Server(target, self._sock.dup(), identity, self._mdm)
        # Before the first client can come: its capability is checked with the key that is in here.
        server.registered(reply)
        await self._nursery.start(self._run_server, server)
        self._server = server
        self._log.info("serving", sds=sds_id, incarnation=identity.incarnation, address=list(self._data_address))

    async def _run_server(self, server: Server, *, task_status: trio.TaskStatus[None]) -> None:
        self._served = served = trio.Event()
        self._serving_scope = scope = trio.CancelScope()
        try:
            with scope:
                await server.run(task_status=task_status)
        finally:
            served.set()

    async def _report_periodically(self) -> None:
        assert self._mdm is not None
        while True:
            await trio.sleep(REPORT_SECONDS)
            if self._admitted and self._mdm.connected:
                # Not a call: a report that is lost is made good by the next one, and what was purged is asked for
                # again.
                with contextlib.suppress(Error):
                    await self._mdm.notify("sds.report", self._report())

    def _report(self) -> dict[str, Any]:
        failed = dict(self._devices.failed)
        if self._server is None:
            return {
                "stats": {},
                "failed_devices": _as_list(failed),
                "purged": [],
                "faults": self._faults.describe(),
            }
        failed |= self._server.failed_devices
        return {
            "stats": self._server.stats(),
            "failed_devices": _as_list(failed),
            "purged": self._server.take_purged(),
            "faults": self._faults.describe(),
        }

    async def _handle(self, method: str, params: dict[str, Any]) -> Any:
        handler = self._methods.get(method)
        if handler is None:
            raise NotFoundError(f"an SDS has no method {method!r}")
        try:
            return await handler(params)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidError(f"{method}: bad parameters: {error!r}") from None

    async def _rpc_admitted(self, _params: dict[str, Any]) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._register_again)

    async def _register_again(self) -> None:
        assert self._session is not None
        # On the session, not on whichever there will be: should this one break now, the next one registers anyway.
        session = self._session
        try:
            await self._register(session)
        except Error as error:
            # As when it was made: without this the session would stay, and we on it, unregistered for good.
            session.close(error.message)

    async def _rpc_peers(self, params: dict[str, Any]) -> None:
        if self._server is not None:
            self._server.set_peers(params["peers"])

    async def _rpc_ping(self, _params: dict[str, Any]) -> dict[str, Any]:
        return {}

    async def _rpc_listens(self, params: dict[str, Any]) -> bool:
        return await self._serving().listens(int(params["peer"]))

    async def _rpc_map_changed(self, params: dict[str, Any]) -> None:
        # While nothing is served no part of the map is known.
        if self._server is not None:
            await self._server.map_changed(params)

    async def _rpc_resync(self, params: dict[str, Any]) -> None:
        if self._server is not None:
            self._server.set_rates(params["pools"])

    async def _rpc_reserved(self, params: dict[str, Any]) -> None:
        if self._server is not None:
            self._server.set_reserved(int(params["slots"]))

    async def _rpc_stop(self, _params: dict[str, Any]) -> None:
        self._stop.set()

    async def _rpc_changed(self, params: dict[str, Any]) -> None:
        if self._server is not None:
            await self._server.changed(int(params["volume_id"]), params["info"])

    async def _rpc_revoked(self, params: dict[str, Any]) -> None:
        # While nothing is served nothing is granted, and every mapping will be asked for.
        if self._server is not None:
            await self._server.revoked(int(params["volume_id"]), int(params["sdc_id"]))

    async def _rpc_deleted(self, params: dict[str, Any]) -> None:
        await self._serving().deleted(int(params["volume_id"]))

    async def _rpc_repair(self, params: dict[str, Any]) -> None:
        self._serving().repair(int(params["volume_id"]), [int(chunk) for chunk in params["chunks"]])

    async def _rpc_verify(self, params: dict[str, Any]) -> list[list[Any]]:
        return await self._serving().verify(int(params["volume_id"]), int(params["first_chunk"]), int(params["count"]))

    def _serving(self) -> Server:
        if self._server is None:
            raise ConflictError(
                f"SDS {self._node.name} fails on purpose: `pfvol sds recover {self._node.name}` ends that"
                if self._faults.failed
                else f"SDS {self._node.name} does not serve: its log says why"
            )
        return self._server


def _as_list(failed: dict[int, str]) -> list[list[Any]]:
    return [[index, message] for index, message in sorted(failed.items())]


def advertised(bind: str, mdm: tuple[str, int]) -> str:
    """The address to tell the MDM: the one we listen on; if that is any, the one from which the MDM is reached."""
    if bind not in ("", "0.0.0.0", "::"):
        return bind
    try:
        ((family, kind, _, _, address), *_) = socket.getaddrinfo(*mdm, type=socket.SOCK_DGRAM)
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket: sends nothing, only picks the route
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"no address to be reached at is known ({error}): set [sds] advertise") from None
