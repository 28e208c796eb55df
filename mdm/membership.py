"""Who is connected to the MDM and what they last said. Only in memory: after a restart everybody registers again.

Pure bookkeeping: no await, no socket. What of it must not be forgotten (states, addresses) is in the manager's
``State``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mdm.model import Sds, State
from mdm.progress import Status
from pfvol.config import Address
from pfvol.rpc.session import Session


@dataclass
class Candidate:
    """A connected node that runs an SDS, admitted (``sds_id``) or waiting to be."""

    node: str
    session: Session
    data_address: Address
    sds_id: int | None = None


@dataclass
class SdsRuntime:
    """``reported_at`` on trio's clock."""

    session: Session
    serving: bool
    """It has come with its devices."""
    reported_at: float
    failed_devices: list[tuple[int, str]] = field(default_factory=list)
    copied_bytes: int | None = None
    """To learners, since its process began; None: it has not said yet."""

    def has_copied(self, total_bytes: int) -> None:
        """Said in reports and with chunks that were learned, which may overtake each other."""
        self.copied_bytes = max(total_bytes, self.copied_bytes or 0)


@dataclass(frozen=True)
class FaultStatus:
    """What an SDS suffers on purpose. ``revision`` grows with each change; figures are since its process began."""

    revision: int = 0
    failed: bool = False
    until: datetime | None = None
    rules: tuple[str, ...] = ()
    errors_injected: int = 0
    delays_injected: int = 0
    blocks_corrupted: int = 0


@dataclass
class SdcRuntime:
    """``stats`` as ``Initiator.stats``."""

    session: Session
    reported_at: float
    stats: dict[str, Any] = field(default_factory=dict)


class Membership:
    """``sds`` and ``sdc``: the admitted ones that are connected; ``nodes``: every connected node that runs an SDS."""

    def __init__(self) -> None:
        self.sds: dict[int, SdsRuntime] = {}
        self.sds_stats: dict[int, dict[str, Any]] = {}
        """``Target.stats`` as each SDS last reported it. One that is gone still holds what it held: it is used."""
        self.faults: dict[int, FaultStatus] = {}
        """As each SDS last told; kept while it is gone."""
        self.sdc: dict[int, SdcRuntime] = {}
        self.nodes: dict[str, Candidate] = {}
        self.dead: set[int] = set()
        """SDSs whose own end closed their session, and of whose node nothing has been heard since."""
        self.rebuilds: dict[int, Status] = {}
        """How far each pool's rebuild is, as the rebuilder last found."""
        self.seen: set[int] = set()
        """SDSs that have registered since the MDM started: when one of these is not here, it has gone."""

    def faults_of(self, sds_id: int) -> FaultStatus:
        return self.faults.get(sds_id, FaultStatus())

    def node_for(self, state: State, name: str, ip: str | None) -> str:
        """The node that a new SDS shall run on: the one of its name, else a free one at ``ip`` (``host`` or
        ``host:port`` of its data address), else, when no ip was given, the first free one by name; else it waits for
        one of its name."""
        taken = {sds.node for sds in state.sds.values()}
        free = sorted((node for key, node in self.nodes.items() if key not in taken), key=lambda node: node.node)
        if any(node.node == name for node in free) or not free:
            return name
        for node in free:
            host, port = node.data_address
            if ip is None or ip in (host, f"{host}:{port}"):
                return node.node
        return name

    def drop(self, session: Session) -> None:
        """Forgets what hangs on a session that has ended: the node, and the SDS or the SDC that were on it."""
        for name, node in list(self.nodes.items()):
            if node.session is session:
                del self.nodes[name]
        sds_id = next((key for key, runtime in self.sds.items() if runtime.session is session), None)
        sdc_id = next((key for key, runtime in self.sdc.items() if runtime.session is session), None)
        if sds_id is not None:
            del self.sds[sds_id]
            if session.ended_by_peer:
                self.dead.add(sds_id)
        if sdc_id is not None:
            del self.sdc[sdc_id]

    def sds_sessions(self) -> Iterator[tuple[int, Session]]:
        for sds_id, runtime in list(self.sds.items()):
            yield sds_id, runtime.session

    def thin_slots(self, state: State) -> dict[int, int]:
        """Slots that thin volumes occupy on each SDS, as last reported."""
        return {
            sds_id: sum(chunks for volume_id, (chunks, *_) in _volumes(stats) if _is_thin(state, volume_id))
            for sds_id, stats in self.sds_stats.items()
        }

    def written_chunks(self, volume_id: int) -> tuple[int, int]:
        """(chunks, blocks) of a volume that hold data, counted once, at their primaries."""
        chunks = blocks = 0
        for stats in self.sds_stats.values():
            for key, (_, _, primary_chunks, primary_blocks) in _volumes(stats):
                if key == volume_id:
                    chunks += primary_chunks
                    blocks += primary_blocks
        return chunks, blocks

    def pool_thin_bytes(self, state: State, pool_id: int, chunk_bytes: int) -> int:
        """Net bytes of the chunks that a pool's thin volumes occupy."""
        thin = (volume for volume in state.volumes_of(pool_id) if not volume.thick)
        return sum(self.written_chunks(volume.volume_id)[0] for volume in thin) * chunk_bytes


def _volumes(stats: dict[str, Any]) -> Iterable[tuple[int, tuple[int, int, int, int]]]:
    found: dict[int, tuple[int, int, int, int]] = stats.get("volumes", {})
    return found.items()


def _is_thin(state: State, volume_id: int) -> bool:
    volume = state.volumes.get(volume_id)
    return volume is not None and not volume.thick


def peers_of(state: State) -> list[dict[str, Any]]:
    """Every SDS that has an address, as SDSs and SDCs are told."""
    return [_peer(sds) for sds in state.sds.values() if sds.data_address is not None]


def _peer(sds: Sds) -> dict[str, Any]:
    assert sds.data_address is not None
    return {
        "sds_id": sds.sds_id,
        "data_address": list(sds.data_address),
        "incarnation": sds.incarnation,
        "up": sds.state != "DOWN",
    }
