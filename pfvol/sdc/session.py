"""The SDC's decisions: who it is, which volumes it has, where their chunks are, which SDSs it is connected to.

Owns the engine (``datapath.initiator.Initiator``) and the connection to the MDM; one nursery, that of ``run``. Assumes
the MDM may be away for any time: what runs goes on with the map, the addresses and the capabilities at hand. Promises
that every question of the engine is answered in the end, or the volume it is about has gone.

Atomic because no await stands between: all of ``_apply``; in ``_fetch_segment``, from the answer to ``set_segment``.
"""

from __future__ import annotations

import errno
import math
import os
import struct
from collections.abc import Mapping
from typing import Any

import trio

from datapath import wire
from datapath.initiator import Initiator
from pfvol import __version__, handshake
from pfvol.config import format_address
from pfvol.constants import (
    CHUNK_SIZE_BYTES,
    INODE_ROOT,
    REPORT_SECONDS,
    RPC_TIMEOUT_SECONDS,
    SEGMENT_CHUNKS,
    SEGMENT_ENTRY_FORMAT,
)
from pfvol.errors import (
    ConflictError,
    Error,
    ProtocolError,
    UnauthorizedError,
    UnreachableError,
    VersionError,
)
from pfvol.log import get_logger
from pfvol.rpc.client import Reconnecting, Session
from pfvol.sdc import notify
from pfvol.sdc.volumes import Volume, VolumeTable, diff, volumes_from_wire

SEGMENT_BYTES = SEGMENT_CHUNKS * CHUNK_SIZE_BYTES
PREFETCHED_SEGMENTS_MAX = 64  # of one volume: 256 GiB; the map of a larger one is fetched as IO wants it
SEGMENT_FETCHES_MAX = 16
CAPABILITY_RENEWAL_SECONDS = 3600.0
REFRESH_SECONDS_MIN = 0.2  # between two askings for the volumes, however often we are told that they changed
FIGURES_VALID_SECONDS = 1.0
FIGURES_WAIT_SECONDS = 0.25  # how long a stat waits for new figures before it shows the last known
FIGURES_RETRY_SECONDS = 5.0
RETRY_SECONDS_MIN = 0.02
RETRY_SECONDS_MAX = 1.0
SDS_RETRY_SECONDS_MAX = 0.5
MAP_AGAIN_SECONDS = 0.5  # between two askings for what concerns an SDS that is away
MAP_AGAIN_SEGMENTS_MAX = 32  # each time; the others the next time
LOG_AGAIN_SECONDS = 5.0
REFUSAL_CHECK_SECONDS = 0.05
REFUSALS = (UnauthorizedError, VersionError, ConflictError)

ENTRY = struct.Struct(SEGMENT_ENTRY_FORMAT)

SegmentKey = tuple[int, int]


def serving(entries: bytes) -> frozenset[int]:
    """The SDSs that serve a chunk of the segment."""
    members = {sds_id for _, primary, secondary, _, _ in ENTRY.iter_unpack(entries) for sds_id in (primary, secondary)}
    return frozenset(members - {0})


class SdcSession:
    """One SDC: ``run`` it; when that has started it is registered; then ``attach`` it to a mount."""

    def __init__(self, *, name: str, mdm: tuple[str, int], secret: bytes, io_deadline_seconds: float) -> None:
        self.name = name
        self.table = VolumeTable()
        self.unmounted = trio.Event()
        """Set when the kernel says that the mount is gone."""
        self._secret = secret
        self._io_deadline_seconds = io_deadline_seconds
        self._log = get_logger(__name__).bind(sdc=name)
        self._mdm = Reconnecting(
            *mdm, secret=secret, role="sdc", name=name, handler=self._on_mdm, on_connected=self._register
        )
        self._registered = trio.Event()
        self._cluster_id = b""
        self._sdc_id = 0
        self._incarnation = 0
        self._announced: dict[int, Volume] = {}
        self._peers: dict[int, tuple[str, int]] = {}
        self._engine: Initiator | None = None
        self._notifier: notify.KernelNotifier | None = None
        self._nursery: trio.Nursery | None = None
        self._refresh = trio.Event()
        self._renew = False
        self._figures_until = -math.inf
        self._figures_lock = trio.Lock()
        self._connecting: dict[int, trio.Event] = {}
        self._fetching: dict[SegmentKey, bool] = {}  # True: fetch once more, what is on its way may be old
        self._segments: dict[int, dict[int, frozenset[int]]] = {}
        """Per volume the segments that the engine has, each with the SDSs that serve a chunk of it."""
        self._fetches = trio.CapacityLimiter(SEGMENT_FETCHES_MAX)
        self._resizing: dict[int, bool] = {}  # True: once more
        self._logged_at: dict[tuple[Any, ...], float] = {}

    # --- life ---------------------------------------------------------------------------------------------------

    async def run(self, register_timeout_seconds: float, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled. Started: the MDM knows us.

        Raises UnreachableError if the MDM does not answer in time, UnauthorizedError if it does not want us.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                nursery.start_soon(self._mdm.run)
                await self._await_registered(register_timeout_seconds)
                nursery.start_soon(self._refresh_loop)
                nursery.start_soon(self._renewal_loop)
                nursery.start_soon(self._map_loop)
                task_status.started()
                await trio.sleep_forever()
            finally:
                await self._stop_engine()

    async def _await_registered(self, timeout_seconds: float) -> None:
        with trio.move_on_after(timeout_seconds):
            while not self._registered.is_set():
                if isinstance(self._mdm.last_error, REFUSALS):
                    raise self._mdm.last_error  # Trying again will not change it.
                with trio.move_on_after(REFUSAL_CHECK_SECONDS):
                    await self._registered.wait()
            return
        reason = f": {self._mdm.last_error}" if self._mdm.last_error else ""
        raise UnreachableError(f"no MDM at {format_address(self._mdm.address)} within {timeout_seconds:g} s{reason}")

    async def attach(self, fuse_fd: int, relay_fd: int, mountpoint: str, *, force_direct: bool) -> None:
        """Starts the engine on a mount (it owns both descriptors from here on) and shows the volumes."""
        assert self._nursery is not None
        assert self._engine is None
        self._notifier = notify.KernelNotifier(fuse_fd, mountpoint)
        engine = Initiator(self._sdc_id, self._incarnation, io_deadline_seconds=self._io_deadline_seconds)
        engine.start(fuse_fd, relay_fd, force_direct=force_direct)
        self._engine = engine
        self._apply(self._announced, renew=True)
        self._nursery.start_soon(self._event_loop, engine)
        self._nursery.start_soon(self._report_loop, engine)

    async def _stop_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(engine.stop)
        if self._notifier is not None:
            self._notifier.close()

    # --- the MDM ------------------------------------------------------------------------------------------------

    async def _register(self, session: Session) -> None:
        """The first thing on every connection to the MDM.

        Each registering gives a higher incarnation. The first one stays ours: the engine's connections were made with
        it, and if another process has registered under our name since, it must win over us and not we over it.
        """
        answer = await session.call("sdc.register", {"name": self.name, "version": __version__})
        cluster_id = answer["cluster_id"]
        if not self._registered.is_set():
            self._cluster_id, self._sdc_id = cluster_id, answer["sdc_id"]
            self._incarnation = answer["incarnation"]
        elif (cluster_id, answer["sdc_id"]) != (self._cluster_id, self._sdc_id):
            raise ProtocolError("the MDM at this address is of another cluster now, or has forgotten this SDC")
        self._set_peers(answer["peers"])
        self._apply(volumes_from_wire(answer["volumes"]), renew=True)
        for volume_id, loaded in self._segments.items():  # We may have missed a map.changed.
            for index in loaded:
                self._want_segment(volume_id, index)
        self._registered.set()

    async def _on_mdm(self, method: str, params: Mapping[str, Any]) -> Any:
        """Requests and notifications of the MDM."""
        match method:
            case "volumes.changed":
                self._refresh.set()
            case "peers":
                self._set_peers(params["peers"])
            case "map.changed":
                volume_id = params["volume_id"]
                known = set(self._segments.get(volume_id, {}))
                # What is on its way for the first time may have been read before the change.
                known |= {index for fetched_id, index in self._fetching if fetched_id == volume_id}
                for index in known if params["segments"] is None else known & set(params["segments"]):
                    self._want_segment(volume_id, index)
            case _:
                raise ProtocolError(f"an SDC does not know {method!r}")
        return None

    async def _refresh_loop(self) -> None:
        """Fetches the volumes when the MDM says that they changed, or an SDS wants a newer capability."""
        while True:
            await self._refresh.wait()
            self._refresh = trio.Event()
            renew, self._renew = self._renew, False
            try:
                await self._fetch_volumes(renew=renew)
            except Error as error:
                self._log.warning("cannot fetch the volumes; trying again", error=str(error))
                self._renew = self._renew or renew
                self._refresh.set()
                await trio.sleep(RETRY_SECONDS_MAX)
            await trio.sleep(REFRESH_SECONDS_MIN)

    async def _renewal_loop(self) -> None:
        while True:
            await trio.sleep(CAPABILITY_RENEWAL_SECONDS)
            self._want_renewal()

    def _want_renewal(self) -> None:
        self._renew = True
        self._refresh.set()

    async def _fetch_volumes(self, *, renew: bool, timeout_seconds: float = RPC_TIMEOUT_SECONDS) -> None:
        # One at a time: the answers of two could be applied in the wrong order.
        async with self._figures_lock:
            answer = await self._mdm.call("sdc.volumes", {}, timeout=timeout_seconds)
            self._apply(volumes_from_wire(answer["volumes"]), renew=renew)

    async def freshen(self) -> None:
        """Sees to it that the figures (allocated bytes, pool space) are about a second old, if the MDM can be asked."""
        if trio.current_time() < self._figures_until or not self._mdm.connected:
            return
        self._figures_until = trio.current_time() + FIGURES_RETRY_SECONDS
        try:
            with trio.move_on_after(FIGURES_WAIT_SECONDS):
                await self._fetch_volumes(renew=False)
        except Error as error:
            self._log_sometimes("figures", "cannot fetch the volumes' figures", error=str(error))

    # --- volumes ------------------------------------------------------------------------------------------------

    def _apply(self, volumes: Mapping[int, Volume], *, renew: bool) -> None:
        """Puts what the MDM announced in force at the engine, in the table, and (in the background) in the kernel."""
        self._announced = dict(volumes)
        self._figures_until = trio.current_time() + FIGURES_VALID_SECONDS
        engine, notifier = self._engine, self._notifier
        if engine is None or notifier is None:
            return
        old = dict(self.table.by_id)
        changes = diff(old, volumes)
        for volume in changes.removed:
            engine.remove_volume(volume.volume_id)
            self._segments.pop(volume.volume_id, None)
        self.table.replace(volumes)
        for volume in changes.added:
            self._add(engine, volume)
        for before, volume in changes.changed:
            self._change(engine, before, volume)
        for volume_id, volume in volumes.items():
            if volume_id in old and (renew or volume.permission != old[volume_id].permission):
                engine.set_capability(volume_id, volume.capability)
        self._tell_kernel(notifier, changes.removed, changes.changed)

    def _add(self, engine: Initiator, volume: Volume) -> None:
        engine.add_volume(
            volume.volume_id,
            volume.inode,
            volume.size_bytes,
            read_only=volume.read_only,
            capability=volume.capability,
            iops_limit=volume.iops_limit,
            bandwidth_limit_bytes=volume.bandwidth_limit_bytes,
        )
        self._log.info("volume mapped", volume=volume.name, size_bytes=volume.size_bytes, read_only=volume.read_only)
        self._prefetch(volume, 0)

    def _change(self, engine: Initiator, before: Volume, volume: Volume) -> None:
        engine.set_volume(
            volume.volume_id,
            volume.size_bytes,
            read_only=volume.read_only,
            iops_limit=volume.iops_limit,
            bandwidth_limit_bytes=volume.bandwidth_limit_bytes,
        )
        self._log.info("volume changed", volume=volume.name, size_bytes=volume.size_bytes, read_only=volume.read_only)
        if volume.size_bytes > before.size_bytes:
            # The segment that the old end was in has more chunks now.
            self._prefetch(volume, (before.size_bytes - 1) // SEGMENT_BYTES)

    def _tell_kernel(
        self, notifier: notify.KernelNotifier, removed: tuple[Volume, ...], changed: tuple[tuple[Volume, Volume], ...]
    ) -> None:
        assert self._nursery is not None
        messages = [notify.deleted(INODE_ROOT, volume.inode, volume.name.encode()) for volume in removed]
        for before, volume in changed:
            if before.name != volume.name:
                messages.append(notify.deleted(INODE_ROOT, before.inode, before.name.encode()))
            messages.append(notify.forget_attributes(volume.inode))
            if before.size_bytes != volume.size_bytes:
                self._want_size_corrected(volume.volume_id)
        for volume in removed:
            self._log.info("volume unmapped", volume=volume.name)
        if messages:
            self._nursery.start_soon(self._send_to_kernel, notifier, [*messages, notify.forget_attributes(INODE_ROOT)])

    async def _send_to_kernel(self, notifier: notify.KernelNotifier, messages: list[bytes]) -> None:
        for message in messages:
            try:
                await trio.to_thread.run_sync(notifier.send, message, abandon_on_cancel=True)
            except OSError as error:
                self._log.warning("the kernel did not take a notification", error=error.strerror)

    def _want_size_corrected(self, volume_id: int) -> None:
        assert self._nursery is not None
        if volume_id in self._resizing:
            self._resizing[volume_id] = True
        else:
            self._resizing[volume_id] = False
            self._nursery.start_soon(self._correct_size, volume_id)

    async def _correct_size(self, volume_id: int) -> None:
        """The kernel's idea of the size made right; one at a time per volume, with the size in force when it starts."""
        try:
            again = True
            while again and (volume := self.table.by_id.get(volume_id)) and self._notifier:
                self._resizing[volume_id] = False
                arguments = (self._notifier, volume.name, volume.inode, volume.size_bytes)
                try:
                    await trio.to_thread.run_sync(notify.correct_size, *arguments, abandon_on_cancel=True)
                except OSError as error:
                    self._log.warning("cannot correct a file's size", volume=volume.name, error=error.strerror)
                again = self._resizing[volume_id]
        finally:
            del self._resizing[volume_id]

    # --- the map ------------------------------------------------------------------------------------------------

    def _prefetch(self, volume: Volume, first: int) -> None:
        """A small volume's whole map, so that IO anywhere in it goes on while the MDM is away; of a larger one, what is
        known already and may have changed."""
        count = -(-volume.size_bytes // SEGMENT_BYTES)
        loaded = self._segments.get(volume.volume_id, {}).keys()
        for index in range(first, count) if count <= PREFETCHED_SEGMENTS_MAX else loaded & {first}:
            self._want_segment(volume.volume_id, index)

    def _want_segment(self, volume_id: int, index: int) -> None:
        assert self._nursery is not None
        key = (volume_id, index)
        if key in self._fetching:
            self._fetching[key] = True
        else:
            self._fetching[key] = False
            self._nursery.start_soon(self._fetch_segment, key)

    async def _fetch_segment(self, key: SegmentKey) -> None:
        volume_id, index = key
        delay_seconds = RETRY_SECONDS_MIN
        again = True
        try:
            while again and volume_id in self.table.by_id:
                try:
                    async with self._fetches:
                        self._fetching[key] = False
                        entries = await self._mdm.call("map.segment", {"volume_id": volume_id, "segment": index})
                except Error as error:
                    # Also when the MDM says that we do not have the volume: it may be mapped again before we hear of
                    # that, and the engine asks only once.
                    self._log_sometimes("segment", "cannot fetch a part of the map", error=str(error))
                    await trio.sleep(delay_seconds)
                    delay_seconds = min(delay_seconds * 2, RETRY_SECONDS_MAX)
                    continue
                if self._engine is not None and volume_id in self.table.by_id:
                    self._engine.set_segment(volume_id, index, entries)
                    self._segments.setdefault(volume_id, {})[index] = serving(entries)
                again = self._fetching[key]
        finally:
            del self._fetching[key]

    async def _map_loop(self) -> None:
        """Chunks of an SDS that is away may be served elsewhere by now, and the news of it may have been lost: asks."""
        done: set[SegmentKey] = set()
        while True:
            await trio.sleep(MAP_AGAIN_SECONDS)
            concerned = {
                (volume_id, index)
                for volume_id, loaded in self._segments.items()
                for index, members in loaded.items()
                if not members.isdisjoint(self._connecting)
            }
            if not concerned - done:
                done.clear()
            turn = sorted(concerned - done)[:MAP_AGAIN_SEGMENTS_MAX]
            done.update(turn)
            for key in turn:
                if key not in self._fetching:
                    self._want_segment(*key)

    # --- SDSs ---------------------------------------------------------------------------------------------------

    def _set_peers(self, peers: list[Mapping[str, Any]]) -> None:
        self._peers = {
            int(peer["sds_id"]): (str(peer["data_address"][0]), int(peer["data_address"][1]))
            for peer in peers
            if peer["data_address"]
        }
        for news in self._connecting.values():
            news.set()

    def _want_sds(self, sds_id: int) -> None:
        assert self._nursery is not None
        if sds_id not in self._connecting:
            self._connecting[sds_id] = trio.Event()
            self._nursery.start_soon(self._connect_sds, sds_id)

    async def _connect_sds(self, sds_id: int) -> None:
        """Tries until it is connected; news of the SDSs cut a pause short."""
        delay_seconds = RETRY_SECONDS_MIN
        try:
            while True:
                news = self._connecting[sds_id] = trio.Event()
                address = self._peers.get(sds_id)
                if address is None:
                    await news.wait()
                    continue
                if await self._try_sds(sds_id, address):
                    return
                with trio.move_on_after(delay_seconds):
                    await news.wait()
                delay_seconds = min(delay_seconds * 2, SDS_RETRY_SECONDS_MAX)
        finally:
            del self._connecting[sds_id]

    async def _try_sds(self, sds_id: int, address: tuple[str, int]) -> bool:
        try:
            descriptor, info = await handshake.connect(
                *address,
                secret=self._secret,
                cluster_id=self._cluster_id,
                role=wire.ROLE_SDC,
                node_id=self._sdc_id,
                incarnation=self._incarnation,
                sds_id=sds_id,
            )
        except handshake.OldSessionError:
            self._log_sometimes("fenced", "another mount uses this SDC's name: this one is fenced off", sds_id=sds_id)
            return False
        except Error as error:
            self._log_sometimes(("sds", sds_id), "cannot connect to an SDS", sds_id=sds_id, error=str(error))
            return False
        if self._engine is None:
            os.close(descriptor)
            return True
        self._engine.add_sds(sds_id, descriptor, info.durable_incarnation)
        self._log.info("connected to an SDS", sds_id=sds_id, address=f"{address[0]}:{address[1]}")
        return True

    # --- the engine ---------------------------------------------------------------------------------------------

    async def _event_loop(self, engine: Initiator) -> None:
        while True:
            await trio.lowlevel.wait_readable(engine.event_fd)
            for event in engine.events():
                self._on_event(event)

    def _on_event(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("sds_closed", sds_id, reason):
                self._log.warning("lost the connection to an SDS", sds_id=sds_id, reason=reason)
                self._want_sds(sds_id)
            case ("sds_needed", sds_id):
                self._want_sds(sds_id)
            case ("map_miss" | "stale_map", volume_id, index):
                self._want_segment(volume_id, index)
            case ("capability_refused", volume_id, sds_id, status):
                self._log_sometimes(
                    ("refused", volume_id), "a capability was refused", volume_id=volume_id, sds_id=sds_id, code=status
                )
                self._want_renewal()
            case ("unmounted",):
                self.unmounted.set()
            case ("relay_closed",):
                pass  # pyfuse3 is ending because the mount is, or has failed, which ends the mount.
            case ("io_error", volume_id, code, message):
                self._on_io_error(volume_id, code, message)
            case ("forced", volume_id, index):
                self._on_forced(volume_id, index)
            case ("past_end", volume_id):
                self._want_size_corrected(volume_id)
            case ("checksum_error", volume_id, chunk_index, sds_id):
                self._log.error("a block did not verify", volume_id=volume_id, chunk_index=chunk_index, sds_id=sds_id)
            case _:
                self._log.error("the engine said something unknown", event_=event)

    def _on_forced(self, volume_id: int, index: int) -> None:
        """The kernel's cache is of the copy that is gone."""
        volume, notifier = self.table.by_id.get(volume_id), self._notifier
        if volume is None or notifier is None:
            return
        self._log.error("an older copy serves, by an operator's word: data was lost", volume=volume.name, segment=index)
        assert self._nursery is not None
        message = notify.forget_data(volume.inode, index * SEGMENT_BYTES, SEGMENT_BYTES)
        self._nursery.start_soon(self._send_to_kernel, notifier, [message])

    def _on_io_error(self, volume_id: int, code: int, message: str) -> None:
        name = errno.errorcode.get(code, str(code))
        self._log_sometimes(
            ("io", volume_id, code), "an application got an error", volume_id=volume_id, errno=name, reason=message
        )

    async def _report_loop(self, engine: Initiator) -> None:
        """Raw counters each second; what cannot be said while the MDM is away is in the next report."""
        while True:
            await trio.sleep(REPORT_SECONDS)
            if self._mdm.connected:
                try:
                    await self._mdm.notify("sdc.report", {"stats": engine.stats()})
                except Error as error:
                    self._log_sometimes("report", "cannot report to the MDM", error=str(error))

    def _log_sometimes(self, key: Any, message: str, **fields: Any) -> None:
        """A warning that may come thousands of times a second, told once per LOG_AGAIN_SECONDS."""
        now = trio.current_time()
        if now - self._logged_at.get(key, -math.inf) >= LOG_AGAIN_SECONDS:
            self._logged_at[key] = now
            self._log.warning(message, **fields)
