"""The SDS role: from a data directory and an MDM's address to a storage server that serves.

Owns the order of things: port, devices, registration, engine, serving, and their end. Assumes a node that gives
configuration and says when to stop. Promises: nothing is served before the MDM has admitted the SDS and told its peers;
once it serves, the MDM may go away; a device that cannot be used never ends the process, it is reported; a clean stop
checkpoints, closes the devices clean and ends within STOP_SECONDS.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from datapath.target import Target
from pfvol import __version__
from pfvol.constants import REPORT_SECONDS
from pfvol.errors import ConfigError, ConflictError, Error, InvalidError, NotFoundError, ProtocolError
from pfvol.log import get_logger
from pfvol.node import Node
from pfvol.rpc.client import Reconnecting, Session
from pfvol.sds import acceptor
from pfvol.sds.devices import Devices, load_state, parse_specs
from pfvol.sds.peers import Identity
from pfvol.sds.server import Server

STOP_SECONDS: Final = 15.0
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
        self._admitted = False
        self._registering = trio.Lock()
        self._stop = trio.Event()
        self._mdm: Reconnecting | None = None
        self._session: Session | None = None
        self._nursery: trio.Nursery | None = None
        self._sock: trio.socket.SocketType | None = None
        self._methods: dict[str, Handler] = {
            "map.changed": self._rpc_map_changed,
            "sds.admitted": self._rpc_admitted,
            "peers": self._rpc_peers,
            "ping": self._rpc_ping,
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
            self._sock = await acceptor.bind(bind, wanted)
        except ConfigError:
            if self._config.data_port or not wanted:
                raise
            self._sock = await acceptor.bind(bind, 0)
        port = self._sock.getsockname()[1]
        if port != state.data_port:
            self._devices.remember(data_port=port)
        self._data_address = (self._config.advertise or advertised(bind, self._mdm_address), port)

    async def _stop_is_wanted(self) -> None:
        async with trio.open_nursery() as nursery:

            async def wait(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait, self._node.stopping)
            nursery.start_soon(wait, self._stop)

    async def _close(self) -> None:
        """The engine first, then the devices; clean only if the engine could write its last checkpoint.

        The port is closed when the engine has stopped and not before: to the peers a port that refuses says that
        nothing is left here that could serve.
        """
        if self._target is not None:
            with trio.move_on_after(STOP_SECONDS) as deadline:
                await trio.to_thread.run_sync(self._target.stop, abandon_on_cancel=True)
            if deadline.cancelled_caught:
                # Its thread may still use the devices: they stay as they are, the next start recovers them.
                self._log.error("the engine did not stop in time", seconds=STOP_SECONDS)
                return
        if self._sock is not None:
            self._sock.close()
        await self._devices.close()
        self._log.info("stopped")

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
            if self._devices.failed:
                # What the lost device held cannot be told from what was never written: serving the rest would serve
                # zeros.
                self._log.error("not serving: a device is out of service", devices=self._devices.failed)
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
        await self._nursery.start(server.run)
        self._server = server
        self._log.info("serving", sds=sds_id, incarnation=identity.incarnation, address=list(self._data_address))

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
            return {"stats": {}, "failed_devices": _as_list(failed), "purged": []}
        failed |= self._server.failed_devices
        return {
            "stats": self._server.stats(),
            "failed_devices": _as_list(failed),
            "purged": self._server.take_purged(),
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

    async def _rpc_verify(self, params: dict[str, Any]) -> list[list[Any]]:
        return await self._serving().verify(int(params["volume_id"]), int(params["first_chunk"]), int(params["count"]))

    def _serving(self) -> Server:
        if self._server is None:
            raise ConflictError(f"SDS {self._node.name} does not serve: its log says why")
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
