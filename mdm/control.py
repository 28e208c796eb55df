"""What SDSs and SDCs may ask and tell the MDM: the methods of the control RPC.

Owns the checks of what they send (everything is hostile until it has passed) and who has registered as what on which
session. State changes go through the orchestrator; what is only known at run time goes into the membership.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import trio

from mdm import commands, faults
from mdm.membership import Candidate, SdcRuntime, SdsRuntime, peers_of
from mdm.model import Device, Volume, VolumeMapping
from mdm.orchestrator import Orchestrator, volume_info
from mdm.rates import leads_of, rates_of
from mdm.repairs import Repairs
from mdm.views import View
from mdm.witness import Witness
from pfvol import capability
from pfvol.config import Address, parse_address
from pfvol.constants import BLOCK_SIZE_BYTES, CAPABILITY_SECONDS, CHUNK_SIZE_BYTES, NAME_LENGTH_MAX
from pfvol.errors import ConflictError, DeniedError, InvalidError, NotFoundError
from pfvol.log import get_logger
from pfvol.rpc.messages import Params
from pfvol.rpc.session import Session

DEVICES_MAX = 256
TEXT_LENGTH_MAX = 1024
PURGED_MAX = 65536
VOLUMES_REPORTED_MAX = 100_000
CHUNKS_NAMED_MAX = 1024 * 1024
NUMBER_MAX = 2**63 - 1

Method = Callable[[Session, Params], Awaitable[Any]]

_log = get_logger(__name__)


class Control:
    """The service behind the control port (see ``pfvol.rpc.server.Service``)."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._orchestrator = orchestrator
        self._manager = orchestrator.manager
        self._membership = orchestrator.membership
        self._repairs = Repairs()
        self._mended = Repairs("entries_repaired", "devices_unsure")
        self._witness = Witness(orchestrator.membership)
        self._in_vain: dict[tuple[int, int], commands.LeaveOut] = {}
        """What was asked last and changed nothing, of these maps."""
        self._in_vain_of: Mapping[int, Any] = {}
        self._ids: dict[Session, int] = {}
        """Of sessions that have registered: the SDS or SDC that they are of."""
        self._methods: dict[str, dict[str, Method]] = {
            "sds": {
                "sds.register": self._sds_register,
                "sds.report": self._sds_report,
                "sds.leave_out": self._sds_leave_out,
                "sds.withdraw": self._sds_withdraw,
                "sds.learned": self._sds_learned,
                "map.volume": self._map_volume,
                "map.segment": self._map_segment,
            },
            "sdc": {
                "sdc.register": self._sdc_register,
                "sdc.volumes": self._sdc_volumes,
                "sdc.report": self._sdc_report,
                "map.segment": self._map_segment,
            },
        }

    # -- sessions

    def opened(self, session: Session) -> None:
        """A session counts when it has registered. But whose node speaks is not dead."""
        if session.peer.role == "sds":
            self._membership.dead -= {
                sds.sds_id for sds in self._manager.state.sds.values() if sds.node == session.peer.name
            }

    def closed(self, session: Session) -> None:
        self._ids.pop(session, None)
        self._membership.drop(session)
        self._orchestrator.pushes.dropped(session)
        self._orchestrator.wake()

    async def handle(self, session: Session, method: str, params: Params) -> Any:
        function = self._methods[session.peer.role].get(method)
        if function is None:
            raise NotFoundError(f"the MDM has no method {method!r} for role {session.peer.role}")
        return await function(session, params)

    def _registered(self, session: Session) -> int:
        number = self._ids.get(session)
        if number is None:
            raise DeniedError(f"{session.peer.role} {session.peer.name} has not registered on this connection")
        return number

    # -- SDSs

    async def _sds_register(self, session: Session, params: Params) -> dict[str, Any]:
        name = session.peer.name
        if _text(params, "node", NAME_LENGTH_MAX) != name:
            raise DeniedError(f"{name} registers as another node")
        address = _address(params.get("data_address"), "data_address")
        http = None if params.get("http_address") is None else _address(params["http_address"], "http_address")
        devices = _devices(params.get("devices"))
        suffers = faults.parse_status(params.get("faults"))
        cluster_id = self._manager.state.cluster.cluster_id
        if params.get("cluster_id") not in (None, cluster_id):
            raise ConflictError(f"the devices of {name} belong to another cluster: use another data directory")
        known = self._membership.nodes.get(name)
        if known is not None and known.session is not session:
            known.session.close("the node has connected again")
        candidate = Candidate(name, session, address)
        self._membership.nodes[name] = candidate
        sds = next((sds for sds in self._manager.state.sds.values() if sds.node == name), None)
        if sds is None:
            return {"admitted": False, "cluster_id": cluster_id}
        if params.get("sds_id") not in (None, sds.sds_id):
            raise ConflictError(
                f"the devices of {name} are those of SDS number {params['sds_id']}, which was removed;"
                f" SDS {sds.name} needs another data directory"
            )
        command = commands.RegisterSds(
            sds_id=sds.sds_id,
            node=name,
            data_address=address,
            http_address=http,
            incarnation=_whole(params, "incarnation"),
            devices=devices,
        )
        # Before the command: with the state UP and nobody here it would be found to be gone.
        runtime = SdsRuntime(session, bool(devices), trio.current_time())
        self._membership.sds[sds.sds_id] = runtime
        self._membership.seen.add(sds.sds_id)
        self._membership.dead.discard(sds.sds_id)
        try:
            await self._orchestrator.execute(command)
        except BaseException:
            self._withdraw(sds.sds_id, runtime)
            raise
        await faults.note(self._orchestrator, sds.sds_id, suffers, is_newest=True)
        # Meanwhile the session may have ended, or the node connected again: then this answer goes nowhere.
        if session.closed.is_set() or self._membership.nodes.get(name) is not candidate:
            self._withdraw(sds.sds_id, runtime)
            raise ConflictError(f"{name} has connected again")
        if sds.sds_id not in self._manager.state.sds:
            raise NotFoundError(f"SDS {sds.name} was removed")
        candidate.sds_id = sds.sds_id
        self._ids[session] = sds.sds_id
        reply = self._admission(session, sds.sds_id, serving=bool(devices))
        if params.get("unsure"):
            # It has to compare all that it may have had with the other copies.
            volumes = self._manager.state.volumes.values()
            reply["placed"] = [volume.volume_id for volume in volumes if volume.uses(sds.sds_id)]
        return reply

    def _withdraw(self, sds_id: int, runtime: SdsRuntime) -> None:
        if self._membership.sds.get(sds_id) is runtime:
            del self._membership.sds[sds_id]
        self._orchestrator.wake()

    def _admission(self, session: Session, sds_id: int, *, serving: bool) -> dict[str, Any]:
        state = self._manager.state
        sds = state.sds[sds_id]
        if serving:
            self._orchestrator.pushes.sds_registered(session, sds_id, state)
        return {
            "admitted": True,
            "cluster_id": state.cluster.cluster_id,
            "sds_id": sds_id,
            "name": sds.name,
            "capability_key": state.cluster.capability_key,
            "devices": [{"index": item.index, "path": item.path, "slots": item.slots} for item in sds.devices],
            "reserved_slots": sds.thick_slots,
            "map_version": state.map_version,
            "resync": rates_of(state, leads_of(state), sds_id),
            "peers": peers_of(state),
            "purge": [purge.volume_id for purge in state.purges.values() if sds_id in purge.sds_ids],
            "volumes": [
                volume.volume_id for volume in state.volumes.values() if volume.mappings and volume.uses(sds_id)
            ],
            "learning": [volume.volume_id for volume in state.volumes.values() if volume.is_copied(sds_id)],
        }

    async def _sds_report(self, session: Session, params: Params) -> None:
        sds_id = self._registered(session)
        runtime = self._membership.sds.get(sds_id)
        if runtime is None or runtime.session is not session:
            return  # Removed, or connected again.
        failed = bool(runtime.failed_devices)
        if stats := _stats(params.get("stats"), 4):  # empty while it does not serve: it holds what it held
            self._membership.sds_stats[sds_id] = stats
            runtime.has_copied(stats.get("resync_bytes", 0))
        runtime.failed_devices = _failed_devices(params.get("failed_devices"))
        runtime.reported_at = trio.current_time()
        if bool(runtime.failed_devices) is not failed:
            _log.warning("devices of an SDS", peer=str(session.peer), failed=runtime.failed_devices)
            self._orchestrator.wake()
        await faults.note(self._orchestrator, sds_id, faults.parse_status(params.get("faults")))
        purged = _numbers(params.get("purged"), PURGED_MAX)
        await self._orchestrator.purged(sds_id, purged)
        for repairs in (self._repairs, self._mended) if stats else ():
            news = repairs.news(sds_id, stats, trio.current_time(), known=self._orchestrator.is_known(sds_id))
            if news is not None and sds_id in self._manager.state.sds:
                await self._manager.execute(
                    commands.TellRepairs(
                        sds_id=sds_id,
                        repaired=news.blocks,
                        unrepairable=news.unrepairable,
                        tables=repairs is self._mended,
                    )
                )

    async def _sds_leave_out(self, session: Session, params: Params) -> dict[str, Any]:
        """Where the asker leads the other one is left out at once; where it does not, if that one does not answer."""
        asker, peer = self._serving(session), _whole(params, "peer")
        chunks = None if params.get("chunks") is None else frozenset(_chunks(params["chunks"], 2))
        command = commands.LeaveOut(
            keeper=asker,
            left=peer,
            as_primary=_flag(params, "as_primary"),
            except_chunks=frozenset(_chunks(params.get("except", []), 2)),
            chunks=chunks,
        )
        as_secondary = _flag(params, "as_secondary")
        self._witness.asked(asker, peer)
        at_once = as_secondary and self._witness.is_silent(asker, peer)
        left = await self._leave_out(replace(command, as_secondary=at_once))
        if as_secondary and not at_once and not await self._witness.answers(peer):
            self._serving(session)
            left += await self._leave_out(replace(command, as_primary=False, as_secondary=True))
        if left and (gone := self._manager.state.sds.get(peer)) is not None:
            _log.warning("an SDS was left out", peer=str(session.peer), left=gone.name, chunks=left)
        return {"left": left, "dead": peer in self._membership.dead, "version": self._manager.state.map_version}

    async def _leave_out(self, command: commands.LeaveOut) -> int:
        """Who has trouble with an SDS asks again and again, all who do at once: what found nothing to do is not done
        again while the maps are the same ones and nothing is held back."""
        pair = command.keeper, command.left
        if self._in_vain_of is not self._manager.state.maps:
            self._in_vain_of = self._manager.state.maps
            self._in_vain.clear()
        if self._in_vain.get(pair) == command:
            return 0
        held_back = self._orchestrator.pushes.unsettled() or self._orchestrator.pushes.inherited()
        outcome = await self._orchestrator.execute(command)
        if outcome.result == 0 and not held_back and outcome.state.maps is self._in_vain_of:
            self._in_vain[pair] = command
        return int(outcome.result)

    async def _sds_withdraw(self, session: Session, params: Params) -> dict[str, Any]:
        """The asker's disk cannot keep these chunks; the peer has them."""
        asker, peer = self._serving(session), self._here(_whole(params, "peer"))
        command = commands.Withdraw(
            sds_id=asker,
            peer=peer,
            incarnation=_whole(params, "incarnation"),
            chunks=frozenset(_chunks(params.get("chunks"), 2)),
        )
        outcome = await self._orchestrator.execute(command)
        if outcome.result:
            _log.warning("an SDS gave chunks up", peer=str(session.peer), chunks=outcome.result)
        return {"left": outcome.result, "version": self._manager.state.map_version}

    async def _sds_learned(self, session: Session, params: Params) -> dict[str, Any]:
        asker, learner = self._serving(session), _whole(params, "learner")
        self._here(learner)
        chunks = tuple(_chunks(params.get("chunks"), 3))
        self._membership.sds[asker].has_copied(_whole(params, "resync_bytes"))
        outcome = await self._orchestrator.execute(commands.JoinLearners(primary=asker, learner=learner, chunks=chunks))
        return {"joined": outcome.result.entries, "version": self._manager.state.map_version}

    def _here(self, sds_id: int) -> int:
        runtime = self._membership.sds.get(sds_id)
        if runtime is None or not runtime.serving:
            raise ConflictError(f"SDS number {sds_id} is not here now")
        return sds_id

    def _serving(self, session: Session) -> int:
        """The SDS of this session, if it is the newest one of it and the SDS has come with its devices."""
        sds_id = self._registered(session)
        runtime = self._membership.sds.get(sds_id)
        if runtime is None or runtime.session is not session or not runtime.serving or session.closed.is_set():
            raise ConflictError(f"{session.peer} does not serve, or has connected again")
        return sds_id

    # -- SDCs

    async def _sdc_register(self, session: Session, params: Params) -> dict[str, Any]:
        name = session.peer.name
        if _text(params, "name", NAME_LENGTH_MAX) != name:
            raise DeniedError(f"{name} registers as another SDC")
        ip, _ = parse_address(session.peer.address)
        outcome = await self._orchestrator.execute(commands.RegisterSdc(name=name, ip=ip))
        sdc_id, incarnation = outcome.result
        if session.closed.is_set():
            raise ConflictError(f"{name} has gone")
        self._ids[session] = sdc_id
        self._membership.sdc[sdc_id] = SdcRuntime(session, trio.current_time())
        state = self._manager.state
        self._orchestrator.pushes.sdc_registered(session, sdc_id, state)
        return {
            "cluster_id": state.cluster.cluster_id,
            "sdc_id": sdc_id,
            "name": name,
            "incarnation": incarnation,
            "volumes": self._volumes_of(sdc_id),
            "peers": peers_of(state),
        }

    async def _sdc_volumes(self, session: Session, _: Params) -> dict[str, Any]:
        return {"volumes": self._volumes_of(self._registered(session))}

    async def _sdc_report(self, session: Session, params: Params) -> None:
        runtime = self._membership.sdc.get(self._registered(session))
        if runtime is not None and runtime.session is session:
            runtime.stats = _stats(params.get("stats"), None)
            runtime.reported_at = trio.current_time()

    def _volumes_of(self, sdc_id: int) -> list[dict[str, Any]]:
        view = View(self._manager.state, self._membership)
        volumes = view.state.volumes_mapped_to(sdc_id)
        return [
            self._volume(view, volume, mapping) for volume in volumes if (mapping := volume.mapping(sdc_id)) is not None
        ]

    def _volume(self, view: View, volume: Volume, mapping: VolumeMapping) -> dict[str, Any]:
        pool = view.pool(view.state.pools[volume.pool_id])
        chunks, blocks = self._membership.written_chunks(volume.volume_id)
        granted = capability.Capability(
            sdc_id=mapping.sdc_id,
            volume_id=volume.volume_id,
            mapping_id=mapping.mapping_id,
            read_only=mapping.read_only,
            expires_unix=int(time.time()) + CAPABILITY_SECONDS,
        )
        return {
            "volume_id": volume.volume_id,
            "name": volume.name,
            "size_bytes": volume.size_bytes,
            "read_only": mapping.read_only,
            "thick": volume.thick,
            "capability": capability.sign(view.state.cluster.capability_key, granted),
            "iops_limit": mapping.iops_limit,
            "bandwidth_limit_mbps": mapping.bandwidth_limit_mbps,
            "created_at": volume.created_at.timestamp(),
            "used_bytes": chunks * CHUNK_SIZE_BYTES,
            "used_blocks_bytes": blocks * BLOCK_SIZE_BYTES,
            "pool": {"total_bytes": pool["total_capacity_bytes"], "free_bytes": pool["free_capacity_bytes"]},
        }

    # -- maps

    async def _map_volume(self, session: Session, params: Params) -> dict[str, Any]:
        self._registered(session)
        return volume_info(self._manager.state, _whole(params, "volume_id"))

    async def _map_segment(self, session: Session, params: Params) -> bytes | dict[str, Any]:
        """An SDS is also told a map version that has all of these entries."""
        number = self._registered(session)
        volume_id, segment = _whole(params, "volume_id"), _whole(params, "segment")
        volume = self._manager.state.volumes.get(volume_id)
        if session.peer.role == "sdc" and (volume is None or volume.mapping(number) is None):
            raise NotFoundError(f"volume number {volume_id} is not mapped to {session.peer.name}")
        entries = self._manager.segment(volume_id, segment)
        if session.peer.role == "sdc":
            return entries
        return {"version": self._manager.state.map_version, "entries": entries}


# -- what comes in, checked


def _text(params: Params, key: str, length_max: int = TEXT_LENGTH_MAX) -> str:
    value = params.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= length_max:
        raise InvalidError(f"{key} must be a text of at most {length_max} characters")
    return value


def _whole(params: Params, key: str) -> int:
    value = params.get(key)
    if not _is_number(value):
        raise InvalidError(f"{key} must be a whole number that is not negative")
    return int(params[key])


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= NUMBER_MAX


def _flag(params: Params, key: str) -> bool:
    value = params.get(key, False)
    if not isinstance(value, bool):
        raise InvalidError(f"{key} must be true or false")
    return value


def _chunks(value: Any, fields: int) -> list[tuple[Any, ...]]:
    """``[[volume, chunk], ...]``, with an epoch each when they have three fields."""
    if not isinstance(value, list) or len(value) > CHUNKS_NAMED_MAX:
        raise InvalidError(f"chunks must be a list of at most {CHUNKS_NAMED_MAX}")
    for row in value:
        if not isinstance(row, list) or len(row) != fields or not all(map(_is_number, row)):
            raise InvalidError(f"a chunk must be named by {fields} numbers")
    return [tuple(row) for row in value]


def _address(value: Any, what: str) -> Address:
    match value:
        case [str(host), int(port)] if 0 < len(host) <= TEXT_LENGTH_MAX and 0 < port < 65536:
            return host, port
    raise InvalidError(f"{what} must be a host and a port")


def _devices(value: Any) -> tuple[Device, ...]:
    if not isinstance(value, list) or len(value) > DEVICES_MAX or not all(isinstance(item, dict) for item in value):
        raise InvalidError(f"devices must be a list of at most {DEVICES_MAX} maps")
    return tuple(
        Device(index=_whole(item, "index"), slots=_whole(item, "slots"), device_id=_text(item, "device_id", 64))
        for item in value
    )


def _numbers(value: Any, count_max: int) -> list[int]:
    if not isinstance(value, list) or len(value) > count_max or not all(_is_number(item) for item in value):
        raise InvalidError(f"expected a list of at most {count_max} numbers")
    return value


def _failed_devices(value: Any) -> list[tuple[int, str]]:
    """``[[index, message], ...]``"""
    if not isinstance(value, list) or len(value) > DEVICES_MAX:
        raise InvalidError(f"failed_devices must be a list of at most {DEVICES_MAX}")
    failed = []
    for item in value:
        match item:
            case [int(index), str(message)]:
                failed.append((index, message[:TEXT_LENGTH_MAX]))
            case _:
                raise InvalidError("a failed device must be an index and a message")
    return failed


def _stats(value: Any, figures_per_volume: int | None) -> dict[str, Any]:
    """Counters; those that others compute with are of the type that they rely on.

    figures_per_volume: an SDS's report has that many numbers for each volume; None: an SDC's has a map.
    """
    if not isinstance(value, dict):
        raise InvalidError("stats must be a map")
    volumes = value.get("volumes", {})
    if not isinstance(volumes, dict) or len(volumes) > VOLUMES_REPORTED_MAX:
        raise InvalidError(f"stats of volumes must be a map of at most {VOLUMES_REPORTED_MAX}")
    for volume_id, figures in volumes.items():
        if not _is_number(volume_id):
            raise InvalidError("stats of something that is no volume")
        if figures_per_volume is None:
            if not isinstance(figures, dict):
                raise InvalidError("stats of a volume must be a map")
        elif (
            not isinstance(figures, list)
            or len(figures) != figures_per_volume
            or not all(_is_number(figure) for figure in figures)
        ):
            raise InvalidError(f"stats of a volume must be {figures_per_volume} numbers")
    for key, figure in value.items():
        if key.startswith(("slots_", "resync_", "blocks_", "scrub_")) and not _is_number(figure):
            raise InvalidError(f"{key} must be a number")
    return value
