"""Every change of the cluster's state, as a value: what is asked for, with ids already resolved.

A command is what ``Manager.execute`` takes and ``transition.apply`` carries out. Its fields come from outside: nothing
about them is believed before ``apply`` has checked it. Objects are named by their int ids (``mdm.identity`` resolves
names and external ids), sizes are bytes, rates say their unit. What a command answers (``Outcome.result``) is in its
docstring; without a word about it the result is ``None``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mdm.model import Device
from pfvol.constants import REBUILD_DELAY_SECONDS_DEFAULT, REBUILD_RATE_LIMIT_MBPS_DEFAULT


@dataclass(frozen=True, kw_only=True)
class CreateProtectionDomain:
    """Result: the new pd's id."""

    name: str
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class DeleteProtectionDomain:
    """Without ``cascade`` only an empty one; with it everything inside goes too, unless a volume is mapped."""

    pd_id: int
    cascade: bool = False


@dataclass(frozen=True, kw_only=True)
class CreateFaultSet:
    """Result: the new fault set's id."""

    pd_id: int
    name: str


@dataclass(frozen=True, kw_only=True)
class DeleteFaultSet:
    fault_set_id: int


@dataclass(frozen=True, kw_only=True)
class CreatePool:
    """``capacity_bytes`` is net: user data before copies. ``spare_percent`` None: see ``capacity.spare_percent``.
    Result: the new pool's id."""

    pd_id: int
    name: str
    capacity_bytes: int
    policy: str = "two_copies"
    durability: str = "flush"
    rebuild_rate_limit_mbps: int = REBUILD_RATE_LIMIT_MBPS_DEFAULT
    rebuild_delay_seconds: int = REBUILD_DELAY_SECONDS_DEFAULT
    spare_percent: int | None = None


@dataclass(frozen=True, kw_only=True)
class UpdatePool:
    """None leaves a property as it is."""

    pool_id: int
    name: str | None = None
    capacity_bytes: int | None = None
    policy: str | None = None
    durability: str | None = None
    rebuild_rate_limit_mbps: int | None = None
    rebuild_delay_seconds: int | None = None
    spare_percent: int | None = None


@dataclass(frozen=True, kw_only=True)
class DeletePool:
    pool_id: int


@dataclass(frozen=True, kw_only=True)
class StartRebuild:
    """Takes a cancellation back; SDSs that are DOWN now are not waited for any longer."""

    pool_id: int


@dataclass(frozen=True, kw_only=True)
class CancelRebuild:
    """Nothing is copied in this pool until ``StartRebuild``."""

    pool_id: int


@dataclass(frozen=True, kw_only=True)
class TellRebuild:
    """An event about a pool's rebuild, nothing else. ``type``: an ``EventType`` that starts with ``REBUILD_``."""

    pool_id: int
    type: str
    message: str
    details: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TellRepairs:
    """An event about stored blocks that were bad, of chunks that the SDS leads: rewritten, or in no copy any more. With
    ``tables`` about entries of its slot tables, and devices that do not know what was in their slots."""

    sds_id: int
    repaired: int
    unrepairable: int
    tables: bool = False


@dataclass(frozen=True, kw_only=True)
class AddSds:
    """Admits the SDS that will register from ``node`` (default: its own name). ``devices`` are paths on that node; none
    means ``DEVICES_PER_SDS_DEFAULT`` in its data dir. ``capacity_bytes`` is spread over them in whole chunks.
    Result: the new SDS's id. It is DOWN until it registers."""

    pd_id: int
    name: str
    capacity_bytes: int
    fault_set_id: int | None = None
    node: str | None = None
    ip: str | None = None
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RemoveSds:
    """An SDS without copies goes at once; one with copies is emptied first (``Sds.removing``). ``thin_slots`` as in
    ``CreateVolume``. Result: whether it has gone."""

    sds_id: int
    thin_slots: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class KeepSds:
    """Takes a removal back that has not ended yet."""

    sds_id: int


@dataclass(frozen=True, kw_only=True)
class TellFaults:
    """An SDS fails on purpose (``what`` is ``failed``), does so no more (``recovered``), or its disks are made to
    misbehave, or no longer are (``injected``); ``message`` says it to people."""

    sds_id: int
    what: str
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AddSdc:
    """Result: the new SDC's id."""

    name: str
    ip: str | None = None


@dataclass(frozen=True, kw_only=True)
class RemoveSdc:
    sdc_id: int


@dataclass(frozen=True, kw_only=True)
class CreateVolume:
    """``size_bytes`` is rounded up to whole blocks. ``thin_slots`` (slots that thin volumes occupy on each SDS) and
    ``pool_thin_bytes`` (net, in this pool) are what the SDSs last reported; a thick volume has to fit beside them.
    Result: the new volume's id."""

    pool_id: int
    name: str
    size_bytes: int
    provisioning: str = "thin"
    thin_slots: Mapping[int, int] = field(default_factory=dict)
    pool_thin_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ExtendVolume:
    """``size_bytes`` is the new whole size. ``thin_slots`` and ``pool_thin_bytes`` as in ``CreateVolume``."""

    volume_id: int
    size_bytes: int
    thin_slots: Mapping[int, int] = field(default_factory=dict)
    pool_thin_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class DeleteVolume:
    """Leaves a ``Purge`` in the state until every SDS that held a copy has confirmed with ``VolumePurged``."""

    volume_id: int


@dataclass(frozen=True, kw_only=True)
class MapVolume:
    """``access_mode`` is ``readWrite`` or ``readOnly``; limits of 0 are none. Result: the mapping's id."""

    volume_id: int
    sdc_id: int
    access_mode: str = "readWrite"
    iops_limit: int = 0
    bandwidth_limit_mbps: int = 0


@dataclass(frozen=True, kw_only=True)
class UnmapVolume:
    volume_id: int
    sdc_id: int


@dataclass(frozen=True, kw_only=True)
class RegisterSds:
    """An admitted SDS says where it is and what it has. With devices it serves from now on, and is UP."""

    sds_id: int
    node: str
    data_address: tuple[str, int]
    http_address: tuple[str, int] | None
    incarnation: int
    devices: tuple[Device, ...]


@dataclass(frozen=True, kw_only=True)
class RegisterSdc:
    """A new session of the SDC ``name``, which is added when it is unknown. Result: ``model.SdcSession``."""

    name: str
    ip: str | None = None


@dataclass(frozen=True, kw_only=True)
class SetSdsState:
    sds_id: int
    state: str


@dataclass(frozen=True, kw_only=True)
class LeaveOut:
    """``keeper`` goes on alone where it shares a chunk with ``left``: where it leads (``as_primary``), where ``left``
    leads (``as_secondary``). Who is left out becomes the learner. Of all chunks or only of ``chunks`` (volume, chunk);
    never of ``except_chunks`` nor where two serve and (primary, ``left``) of the entry is in ``unsettled``. Where
    ``left`` is only the learner and the chunk is in ``chunks``, the epoch is raised.
    Result: how many entries changed."""

    keeper: int
    left: int
    as_primary: bool = False
    as_secondary: bool = False
    except_chunks: frozenset[tuple[int, int]] = frozenset()
    chunks: frozenset[tuple[int, int]] | None = None
    unsettled: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Withdraw:
    """``sds_id`` cannot keep its copies of ``chunks`` (volume, chunk): where ``peer`` is the other member it goes on
    alone, where ``sds_id`` is ``peer``'s learner there is none any more. Refused when ``peer`` is not in
    ``incarnation``: it may have restarted, and lack something, since the two of them agreed. ``unsettled``: as in
    ``LeaveOut``. Result: how many entries changed."""

    sds_id: int
    peer: int
    incarnation: int
    chunks: frozenset[tuple[int, int]]
    unsettled: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class JoinLearners:
    """``learner`` has all of ``chunks`` (volume, chunk, epoch) and comes into their sets: beside the primary, or in
    place of the member that is to go. Entries of another epoch, primary or learner are skipped.
    Result: ``model.Joined``."""

    primary: int
    learner: int
    chunks: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class SettleMoves:
    """Of each chunk in which a member was replaced up to ``version`` of the map, one who served before knows of it."""

    version: int


@dataclass(frozen=True, kw_only=True)
class SetLearners:
    """Who is to be brought up to date: per volume (chunk, epoch, SDS; 0: nobody). Entries of another epoch, or that
    have the SDS as a member or as the learner already, are skipped. Result: how many entries changed."""

    choices: Mapping[int, Sequence[tuple[int, int, int]]]


@dataclass(frozen=True, kw_only=True)
class ForceAlone:
    """An operator accepts the loss of what only other copies have: the SDS, which is UP, becomes the only member of
    those chunks that no other member serves, if it has an older whole copy of them (it is a member, or the learner that
    left last) or, with ``incomplete``, is a learner that was never whole. Of all volumes or one. Without ``accepted``
    it is refused, with a text that says what would be lost. Result: ``Forced``."""

    sds_id: int
    volume_id: int | None = None
    incomplete: bool = False
    accepted: bool = True


@dataclass(frozen=True, kw_only=True)
class VolumePurged:
    """The SDS holds nothing of the deleted volume any more. Idempotent."""

    volume_id: int
    sds_id: int


Command = (
    CreateProtectionDomain
    | DeleteProtectionDomain
    | CreateFaultSet
    | DeleteFaultSet
    | CreatePool
    | UpdatePool
    | DeletePool
    | AddSds
    | RemoveSds
    | KeepSds
    | StartRebuild
    | CancelRebuild
    | TellRebuild
    | TellRepairs
    | TellFaults
    | AddSdc
    | RemoveSdc
    | CreateVolume
    | ExtendVolume
    | DeleteVolume
    | MapVolume
    | UnmapVolume
    | RegisterSds
    | RegisterSdc
    | SetSdsState
    | VolumePurged
    | LeaveOut
    | Withdraw
    | JoinLearners
    | SettleMoves
    | SetLearners
    | ForceAlone
)
