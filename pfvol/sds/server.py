"""An SDS that serves: the engine's decisions, made on the trio side.

Owns the running engine (``Target``), the cache of volumes, the peers, the acceptor, and every task between them.
Assumes that it runs in the one trio thread that may call the engine, and that the MDM may be away at any time.
Promises: every question of the engine gets an answer sooner or later; a capability is granted only when its signature,
SDC, volume and expiry hold and its mapping exists; when ``revoked`` or ``deleted`` returns, the engine has taken note;
what is known goes on without the MDM.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from datapath import wire
from pfvol import capability
from pfvol.capability import Capability
from pfvol.constants import CHECKPOINT_SECONDS
from pfvol.errors import ConflictError, DeniedError, DeviceError, Error, InvalidError, NotFoundError, TimedOutError
from pfvol.log import get_logger
from pfvol.sds.acceptor import Acceptor, Clients
from pfvol.sds.membership import Mdm, Membership
from pfvol.sds.peers import Identity, Peers, parse_peers
from pfvol.sds.segments import Segments
from pfvol.sds.volumes import RETRY_SECONDS, SEGMENT_BYTES, VolumeInfo, Volumes, check_mapping, parse_info

if TYPE_CHECKING:  # handed over by the caller: the decisions can be tested without the engine
    from datapath.target import Target

CAPABILITIES_WAITING_MAX: Final = 1024
CAPABILITY_WAIT_SECONDS: Final = 2.0  # for the MDM; the client hears NOT_READY then and shows it again
VERIFY_CHUNKS_MAX: Final = 32
VERIFY_TIMEOUT_SECONDS: Final = 60.0
BARRIER_TIMEOUT_SECONDS: Final = 5.0
SCRUB_BYTES_PER_SECOND: Final = 5_000_000
PURGED_MAX: Final = 65536
CATCH_UP_SECONDS: Final = 2.0  # for the others to find an MDM that is back, and to hear of the newest map
LOGGED_AGAIN_SECONDS: Final = 10.0  # of what a client may bring about over and over; in between it is for debugging


class Server:
    """Takes a started engine and a bound socket; ``run`` serves until it is cancelled. The caller stops the engine."""

    def __init__(self, target: Target, sock: trio.socket.SocketType, identity: Identity, mdm: Mdm) -> None:
        self._target = target
        self._capability_key = b""
        self._volumes = Volumes(mdm.call)
        self._segments = Segments(target, mdm.call, identity.sds_id, self._gone)
        self._clients = Clients()
        self._peers = Peers(identity, target, self._on_peer_connected, self._on_peer_failed)
        self._membership = Membership(target, self._peers, mdm, self._segments)
        self._acceptor = Acceptor(sock, identity, target, self._clients, self._peers)
        self._told: dict[int, VolumeInfo] = {}  # what the engine knows of volumes
        self._capabilities_waiting = 0
        self._warned_at: dict[int, float] = {}  # connection -> when a refusal was last a warning
        self._full_said_at = float("-inf")
        self._registered_at = float("-inf")
        self._verifying = trio.CapacityLimiter(1)
        self._tokens = 0
        self._learning: set[int] = set()  # volumes that the MDM is being asked about because they are copied
        self._answers: dict[int, tuple[trio.Event, list[tuple[Any, ...]]]] = {}
        self._purged: list[int] = []
        self._nursery: trio.Nursery | None = None
        self._making_sure = False
        self._scrubbed_at = 0  # Unix time of the end of the last whole pass; 0: none
        self._log = get_logger("sds.server")
        self._events: dict[str, Callable[..., None]] = {
            "capability": self._on_capability,
            "map_miss": self._on_map_miss,
            "leaving": self._membership.leaving,
            "learned": self._membership.learned,
            "learner_lost": self._membership.learner_lost,
            "peer_silent": self._on_peer_silent,
            "lost": self._membership.lost,
            "copy_refused": self._membership.copy_refused,
            "client_closed": self._on_client_closed,
            "peer_closed": self._on_peer_closed,
            "peer_synced": self._on_peer_synced,
            "device_failed": self._on_device_failed,
            "checkpoint": self._on_checkpoint,
            "verified": self._on_answer,
            "corrupted": self._on_answer,
            "purged": self._on_purged,
            "no_space": self._on_no_space,
            "repair_needed": self._on_repair_needed,
            "repaired": self._on_repaired,
            "scrubbed": self._on_scrubbed,
            "chunk_gone": self._on_chunk_gone,
            "sure": self._on_sure,
        }
        self.failed_devices: dict[int, str] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._target.set_scrub_rate(SCRUB_BYTES_PER_SECOND)
            await nursery.start(self._membership.run)
            nursery.start_soon(self._pump)
            nursery.start_soon(self._checkpoint_periodically)
            await nursery.start(self._peers.run)
            await nursery.start(self._acceptor.run)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # who still has something to be done here hears that nothing is

    # -- what the MDM tells

    def registering(self) -> None:
        """A session begins: what was pushed while there was none is lost, until ``registered`` has made up for it."""
        self._segments.lost()

    def registered(self, reply: dict[str, Any]) -> None:
        """The MDM has admitted us (again): takes its word on everything, and doubts what was learned before."""
        self._registered_at = trio.current_time()
        self._capability_key = bytes(reply["capability_key"])
        self._target.set_reserved(int(reply["reserved_slots"]))
        self._peers.update(parse_peers(reply["peers"]))
        for volume_id in reply["purge"]:
            self._purge(int(volume_id))
        # Changes that were made while we were not connected were not pushed. And what may be used at any moment has to
        # be known here before the MDM goes away. (Before we serve, there is nothing to tell the engine yet: an SDS
        # registers once more when it does.)
        self._volumes.doubt()
        self.set_rates(reply.get("resync", {}))
        if self._nursery is not None:
            if self._segments.registered(int(reply["map_version"])):
                self._spawn(self._segments.catch_up)
            copied = set(map(int, reply["learning"]))
            for volume_id in {*self._volumes, *copied, *map(int, reply["volumes"])}:
                self._spawn(self._relearn, volume_id, volume_id in copied)
            if self._target.unsure and not self._making_sure:
                self._making_sure = True
                self._spawn(self._make_sure, [int(volume_id) for volume_id in reply.get("placed", ())])

    async def listens(self, sds_id: int) -> bool:
        """Whether this other SDS still seems to serve, as far as can be seen from here."""
        return await self._peers.listens(sds_id)

    def set_peers(self, peers: Any) -> None:
        self._peers.update(parse_peers(peers))

    def set_reserved(self, slots: int) -> None:
        self._target.set_reserved(slots)

    async def changed(self, volume_id: int, info: Any) -> None:
        """Returns when the engine has been told, the maps included: a mapped volume's first IO needs no MDM."""
        told = parse_info(info)
        if not told.mappings and volume_id not in self._volumes:
            return
        self._volumes.put(volume_id, told)
        if await self._learn(volume_id, told):
            await self._segments.prefetch(volume_id, told.segments)

    async def map_changed(self, body: Any) -> None:
        """Returns when the engine acts on a map of this version: the MDM counts on it."""
        push = self._segments.parse_push(body)
        self._segments.pushed(push)
        if self._nursery is not None:  # Else all of this is told again when we serve.
            for volume_id in self._segments.ours(push) - self._told.keys() - self._learning:
                self._spawn(self._learn_to_copy, volume_id)
        await self._segments.reached(push.version)
        await self._barrier()

    def set_rates(self, pools: Any) -> None:
        """How many bytes a second may be copied to learners, per pool."""
        for pool_id, bytes_per_second in pools.items():
            self._target.set_resync_rate(int(pool_id), int(bytes_per_second))

    async def deleted(self, volume_id: int) -> None:
        self._purge(volume_id)
        await self._barrier()

    async def revoked(self, volume_id: int, sdc_id: int) -> None:
        self._volumes.revoke(volume_id, sdc_id)
        self._target.revoke(volume_id, sdc_id)
        await self._barrier()

    async def verify(self, volume_id: int, first_chunk: int, count: int) -> list[list[Any]]:
        """Present, tags and bad bits of ``count`` chunks: [present, tags or None, bad or None] each."""
        if not 1 <= count <= VERIFY_CHUNKS_MAX:
            raise InvalidError(f"verify takes 1 to {VERIFY_CHUNKS_MAX} chunks a call, not {count}")
        async with self._verifying:
            answers = []
            for chunk in range(first_chunk, first_chunk + count):
                ask = partial(self._target.verify, volume_id=volume_id, chunk_index=chunk)
                present, tags, bad = await self._ask_engine(ask, VERIFY_TIMEOUT_SECONDS)
                answers.append([present, tags, bad] if present else [False, None, None])
            return answers

    def repair(self, volume_id: int, chunks: Iterable[int]) -> None:
        """Has bad blocks of these chunks rewritten from their other copy, soon."""
        for chunk in chunks:
            self._target.repair(volume_id, chunk)

    async def corrupt(self, volume_id: int, chunk: int, block: int) -> None:
        """Flips bytes of a stored block. NotFoundError: no copy here; ConflictError: never written; DeviceError."""
        ask = partial(self._target.corrupt, volume_id=volume_id, chunk_index=chunk, block=block)
        (error,) = await self._ask_engine(ask, BARRIER_TIMEOUT_SECONDS)
        if error == errno.ENOENT:
            raise NotFoundError(
                f"this SDS holds nothing of chunk {chunk}: it has no copy, or nothing was written to it"
            )
        if error == errno.ENODATA:
            raise ConflictError(f"block {block} of chunk {chunk} is not written: there is nothing to corrupt")
        if error:
            raise DeviceError(f"block {block} of chunk {chunk} cannot be corrupted: {os.strerror(error)}")

    def stats(self) -> dict[str, Any]:
        return self._target.stats() | {"scrub_finished": self._scrubbed_at}

    def take_purged(self) -> list[int]:
        """Volumes whose slots were given back since the last call. The MDM asks again for what it did not hear."""
        purged, self._purged = self._purged, []
        return purged

    # -- what the engine tells

    async def _pump(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._target.event_fd)
            for name, *arguments in self._target.events():
                self._events[name](*arguments)

    def _on_capability(self, conn_id: int, request_id: int, volume_id: int, token: bytes) -> None:
        sdc_id = self._clients.sdc_of(conn_id)
        if sdc_id is None:
            return  # closed meanwhile
        try:
            shown = capability.verify(
                self._capability_key, token, sdc_id=sdc_id, volume_id=volume_id, now_unix=time.time()
            )
        except DeniedError as error:
            self._refuse(conn_id, request_id, volume_id, wire.ST_NOT_AUTHORIZED, error.message)
            return
        if self._volumes.decides(shown):
            self._decide(conn_id, request_id, shown)
        elif self._capabilities_waiting >= CAPABILITIES_WAITING_MAX:
            self._refuse(conn_id, request_id, volume_id, wire.ST_NOT_READY, "too many capabilities wait for the MDM")
        else:
            self._spawn(self._ask_and_decide, conn_id, request_id, shown)

    async def _ask_and_decide(self, conn_id: int, request_id: int, shown: Capability) -> None:
        self._capabilities_waiting += 1
        try:
            with trio.move_on_after(CAPABILITY_WAIT_SECONDS):
                await self._settle(shown)
        finally:
            self._capabilities_waiting -= 1
        # Meanwhile the connection may have gone (the engine ignores the answer) or the mapping (_decide looks it up
        # now).
        if self._volumes.decides(shown):
            self._decide(conn_id, request_id, shown)
        else:
            self._refuse(conn_id, request_id, shown.volume_id, wire.ST_NOT_READY, "the MDM has not told of its mapping")

    async def _settle(self, shown: Capability) -> None:
        """Has the MDM say whether the mapping exists, unless it was asked in vain a moment ago."""
        # The answer that is on its way may have been given before the mapping was made.
        await self._volumes.answered(shown.volume_id)
        if self._volumes.decides(shown) or not self._volumes.may_ask(shown.volume_id):
            return
        if await self._relearn(shown.volume_id):
            self._volumes.settle(shown)

    def _decide(self, conn_id: int, request_id: int, shown: Capability) -> None:
        volume_id = shown.volume_id
        info = self._volumes.get(volume_id)
        if info is None:
            self._refuse(conn_id, request_id, volume_id, wire.ST_NO_VOLUME, "no such volume")
            return
        try:
            write = check_mapping(info, shown)
        except DeniedError as error:
            self._refuse(conn_id, request_id, volume_id, wire.ST_NOT_AUTHORIZED, error.message)
            return
        # The engine counts on the boot-time clock, which nobody sets: a step of the wall clock cannot prolong a grant.
        left_ns = int((shown.expires_unix - time.time()) * 1e9)
        expires_boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + left_ns
        self._target.grant(conn_id, request_id, volume_id, write=write, expires_boot_ns=max(expires_boot_ns, 0))

    def _refuse(self, conn_id: int, request_id: int, volume_id: int, status: int, reason: str) -> None:
        sdc_id, now = self._clients.sdc_of(conn_id), trio.current_time()
        log = self._log.debug
        if sdc_id is not None and now - self._warned_at.get(conn_id, float("-inf")) >= LOGGED_AGAIN_SECONDS:
            self._warned_at[conn_id] = now
            log = self._log.warning
        log("capability refused", volume=volume_id, sdc=sdc_id, reason=reason)
        self._target.refuse(conn_id, request_id, volume_id, status)

    def _on_map_miss(self, volume_id: int, segment: int) -> None:
        self._spawn(self._segments.answer_miss, volume_id, segment)

    def _on_client_closed(self, conn_id: int, sdc_id: int, reason: str) -> None:
        self._clients.closed(conn_id)
        self._warned_at.pop(conn_id, None)
        self._log.info("SDC disconnected", sdc=sdc_id, reason=reason)

    def _on_peer_closed(self, conn_id: int, sds_id: int, outgoing: bool, reason: str) -> None:
        self._log.info("peer disconnected", sds=sds_id, outgoing=outgoing, reason=reason)
        if outgoing:
            self._peers.lost(sds_id, conn_id)

    def _on_peer_connected(self, sds_id: int) -> None:
        self._membership.connected(sds_id)

    def _on_peer_silent(self, sds_id: int) -> None:
        """Said again while it lasts. An MDM that died between two pushes has left it behind us: as soon as both of us
        have found the next one that is over, and whoever comes first must not have the other one left out."""
        if self._peers.knows(sds_id) and trio.current_time() - self._registered_at >= CATCH_UP_SECONDS:
            self._membership.trouble(sds_id)

    def _on_peer_failed(self, sds_id: int) -> None:
        self._membership.trouble(sds_id)

    def _on_peer_synced(self, sds_id: int, chunks: int, pulled: int, pushed: int) -> None:
        self._log.info("in sync with peer", sds=sds_id, chunks=chunks, blocks_pulled=pulled, blocks_pushed=pushed)

    def _on_device_failed(self, index: int, errno: int, message: str) -> None:
        self.failed_devices[index] = message
        self._log.error("device failed", device=index, errno=errno, reason=message)

    def _on_checkpoint(self, generation: int, chunks: int, seconds: float) -> None:
        self._log.debug("checkpoint", generation=generation, chunks=chunks, seconds=seconds)

    def _on_answer(self, token: int, *said: Any) -> None:
        if (waiting := self._answers.pop(token, None)) is not None:
            event, answer = waiting
            answer.append(said)
            event.set()

    def _on_purged(self, volume_id: int) -> None:
        if len(self._purged) < PURGED_MAX:
            self._purged.append(volume_id)

    def _on_no_space(self, volume_id: int, chunk: int) -> None:
        log, now = self._log.debug, trio.current_time()
        if now - self._full_said_at >= LOGGED_AGAIN_SECONDS:
            self._full_said_at = now
            log = self._log.error
        log("no space left for a chunk", volume=volume_id, chunk=chunk)

    def _on_repair_needed(self, volume_id: int, chunk: int, block: int, reason: str) -> None:
        self._log.error("stored block is bad", volume=volume_id, chunk=chunk, block=block, reason=reason)

    def _on_repaired(self, volume_id: int, chunk: int, first: int, repaired: int, unrepairable: int) -> None:
        if unrepairable:
            self._log.error(
                "no copy of a block is good", volume=volume_id, chunk=chunk, from_block=first, blocks=unrepairable
            )
        if repaired:
            self._log.warning(
                "bad blocks rewritten from their other copy",
                volume=volume_id,
                chunk=chunk,
                from_block=first,
                blocks=repaired,
            )

    def _on_scrubbed(self, chunks: int, bytes_read: int, errors: int) -> None:
        self._scrubbed_at = int(time.time())
        self._log.info("scrubbed", chunks=chunks, bytes=bytes_read, errors=errors)

    def _on_chunk_gone(self, volume_id: int, chunk: int) -> None:
        self._log.error("no copy of a chunk is known to be whole: a device has rotted", volume=volume_id, chunk=chunk)

    def _on_sure(self) -> None:
        self._log.info("nothing is missing any more of what the devices had lost track of")

    # -- learning of volumes

    async def _make_sure(self, volumes: list[int]) -> None:
        """Has the engine know of every chunk that it may have had; tried again at the next registration."""
        try:
            for volume_id in volumes:
                try:
                    info = await self._volumes.refresh(volume_id)
                except NotFoundError:
                    continue
                await self._learn(volume_id, info)
                for segment in range(info.segments):
                    if not await self._segments.fetch(volume_id, segment, only_ours=True):
                        return
            self._target.maps_whole()
        except Error as error:
            self._log.error("what a device may have lost cannot be looked up", reason=error.message)
        finally:
            self._making_sure = False

    async def _learn_to_copy(self, volume_id: int) -> None:
        """Nobody may have used the volume since we started, but now its copies change."""
        self._learning.add(volume_id)
        try:
            while not await self._relearn(volume_id, True):  # noqa: ASYNC110 - it is the question that is asked again
                await trio.sleep(RETRY_SECONDS)
        finally:
            self._learning.discard(volume_id)

    async def _relearn(self, volume_id: int, whole: bool = False) -> bool:
        """Asks the MDM about the volume and tells the engine; False when the MDM's answer cannot be used.

        ``whole``: all of its map is needed, since chunks are copied without anybody asking for them.
        """
        try:
            info = await self._volumes.refresh(volume_id)
        except NotFoundError:
            self._drop_volume(volume_id)
        except Error as error:
            # The volume stays as it was known, or unknown.
            self._log.error("volume cannot be looked up", volume=volume_id, reason=error.message)
            return False
        else:
            if await self._learn(volume_id, info) or whole:
                self._spawn(partial(self._segments.prefetch, volume_id, info.segments, whole=whole))
        return True

    async def _learn(self, volume_id: int, info: VolumeInfo) -> bool:
        """Makes the engine know ``info``: who may no longer come, the maps, the size; in this order.

        True when the volume is new to the engine: its maps are still to be fetched.
        """
        before = self._told.get(volume_id)
        if before is None:
            self._set_volume(volume_id, info)
            return True
        kept = set(info.mappings.items())
        for sdc_id in {owner[0] for mapping, owner in before.mappings.items() if (mapping, owner) not in kept}:
            self._target.revoke(volume_id, sdc_id)
        if info.size_bytes > before.size_bytes and before.size_bytes % SEGMENT_BYTES:
            # The last segment was fetched when its end lay outside the volume. The engine gets the new chunks before
            # the new size, so that the first request there finds them.
            await self._segments.fetch(volume_id, before.size_bytes // SEGMENT_BYTES)
        # Meanwhile the volume may have changed again, or be gone.
        newest = self._volumes.get(volume_id)
        if newest is not None:
            self._set_volume(volume_id, newest)
        return False

    def _purge(self, volume_id: int) -> None:
        self._volumes.forget(volume_id)
        self._told.pop(volume_id, None)
        self._segments.forget(volume_id)
        self._target.purge_volume(volume_id)

    def _set_volume(self, volume_id: int, info: VolumeInfo) -> None:
        self._told[volume_id] = info
        self._segments.add(volume_id)
        self._target.set_volume(volume_id, info.size_bytes, commit=info.commit, thick=info.thick, pool_id=info.pool_id)

    def _gone(self, volume_id: int) -> None:
        self._volumes.forget(volume_id)
        self._drop_volume(volume_id)

    def _drop_volume(self, volume_id: int) -> None:
        self._told.pop(volume_id, None)
        self._segments.forget(volume_id)
        self._target.drop_volume(volume_id)

    # -- asking the engine

    async def _barrier(self) -> None:
        """Returns when the engine has carried out all commands given before: it takes them in order, answering this."""
        await self._ask_engine(partial(self._target.verify, volume_id=0, chunk_index=0), BARRIER_TIMEOUT_SECONDS)

    async def _ask_engine(self, ask: Callable[[int], None], timeout_seconds: float) -> tuple[Any, ...]:
        """What the engine says to the token that ``ask`` gives it."""
        self._tokens += 1
        token = self._tokens
        event, answer = trio.Event(), list[tuple[Any, ...]]()
        self._answers[token] = (event, answer)
        try:
            with trio.fail_after(timeout_seconds):
                ask(token)
                await event.wait()
        except trio.TooSlowError:
            raise TimedOutError(f"the engine did not answer within {timeout_seconds:g} s") from None
        finally:
            self._answers.pop(token, None)
        return answer[0]

    # -- tasks

    async def _checkpoint_periodically(self) -> None:
        while True:
            await trio.sleep(CHECKPOINT_SECONDS)
            self._target.checkpoint()

    def _spawn(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        if self._nursery is None:
            raise ConflictError("the SDS does not serve yet")
        self._nursery.start_soon(function, *arguments)
