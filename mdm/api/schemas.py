"""The REST API's bodies and objects, as types: what is taken, and what is answered.

Objects are the contract's, with more fields beside them. Sizes are bytes, with decimal GB floats beside them; a body
may give either, or text such as ``1GiB``. References are names or ids.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from pfvol.constants import VOLUME_SIZE_BYTES_MAX
from pfvol.errors import InvalidError
from pfvol.faults import FAIL_SECONDS_MAX, PLACES_MAX
from pfvol.units import parse_size

GB = 1_000_000_000
SIZE_BYTES_MAX = 1024 * VOLUME_SIZE_BYTES_MAX  # what a field takes at all; rules about sizes are the core's

Bytes = Annotated[int, Field(ge=0, le=SIZE_BYTES_MAX)]
Gigabytes = Annotated[float, Field(ge=0, le=SIZE_BYTES_MAX / GB, allow_inf_nan=False)]
SizeText = Annotated[str, Field(max_length=64)]
Reference = Annotated[str, Field(min_length=1, max_length=64, description="A name or an id.")]
Name = Annotated[str, Field(max_length=64)]
Text = Annotated[str, Field(max_length=1024)]
Limit = Annotated[int, Field(ge=0, le=2**31 - 1, description="0: none.")]

Health = Literal["OK", "DEGRADED", "FAILED"]
RebuildState = Literal["IDLE", "IN_PROGRESS", "STALLED", "COMPLETED", "FAILED", "CANCELLED"]


def aliased(noun: str) -> Any:
    """A reference under its plan's name (``pool_id``) or the bare noun (``pool``)."""
    return Field(validation_alias=AliasChoices(f"{noun}_id", noun))


def one_size(what: str, size_bytes: int | None, size_gb: float | None, text: str | None) -> int | None:
    """The size that a body gives in one of three ways; None when in none, ``InvalidError`` when in several."""
    given = [value for value in (size_bytes, size_gb, text) if value is not None]
    if len(given) > 1:
        raise InvalidError(f"give one of {what}_bytes, {what}_gb and {what}, not several")
    if text is not None:
        return parse_size(text)
    return round(size_gb * GB) if size_gb is not None else size_bytes


def required_size(what: str, size_bytes: int | None, size_gb: float | None, text: str | None) -> int:
    found = one_size(what, size_bytes, size_gb, text)
    if found is None:
        raise InvalidError(f"{what}_bytes (or {what}_gb, or {what}) is missing")
    return found


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class CreatePd(Body):
    name: Name
    description: Text = ""


class CreateFaultSet(Body):
    pd_id: Reference = aliased("pd")
    name: Name


class Capacity(Body):
    capacity_bytes: Bytes | None = None
    capacity_gb: Gigabytes | None = None
    capacity: SizeText | None = None

    def capacity_or_none(self) -> int | None:
        return one_size("capacity", self.capacity_bytes, self.capacity_gb, self.capacity)

    def capacity_required(self) -> int:
        return required_size("capacity", self.capacity_bytes, self.capacity_gb, self.capacity)


class CreatePool(Capacity):
    pd_id: Reference = aliased("pd")
    name: Name
    policy: Text = Field("two_copies", validation_alias=AliasChoices("policy", "protection_policy"))
    durability: Text = "flush"
    rebuild_rate_limit_mbps: Limit | None = None
    rebuild_delay_seconds: Limit | None = None
    spare_percent: Limit | None = None


class UpdatePool(Capacity):
    name: Name | None = None
    policy: Text | None = None
    durability: Text | None = None
    rebuild_rate_limit_mbps: Limit | None = None
    rebuild_delay_seconds: Limit | None = None
    spare_percent: Limit | None = None


class AddSds(Capacity):
    pd_id: Reference = aliased("pd")
    name: Name
    fault_set_id: Reference | None = Field(None, validation_alias=AliasChoices("fault_set_id", "fault_set"))
    node: Name | None = None
    ip: Name | None = None
    devices: list[Annotated[str, Field(max_length=4096)]] = Field(default_factory=list, max_length=256)


class FailSds(Body):
    duration: float | None = Field(
        None, gt=0, le=FAIL_SECONDS_MAX, allow_inf_nan=False, description="Seconds until it recovers by itself."
    )


FaultText = Annotated[str, Field(max_length=128)]


class InjectFaults(Body):
    """First ``clear``, then the others."""

    errors: list[FaultText] = Field(default_factory=list, max_length=16, examples=[["pread=EIO@1%"]])
    delays: list[FaultText] = Field(default_factory=list, max_length=16, examples=[["pwrite=20ms"]])
    full: bool = Field(False, description="No room is left on its disks.")
    corrupt: list[FaultText] = Field(default_factory=list, max_length=PLACES_MAX, examples=[["vol1/12:345"]])
    clear: bool = Field(False, description="End all faults of its disks.")


class VerifyVolume(Body):
    first: int = Field(0, ge=0, le=2**32 - 1, description="The first chunk.")
    count: int | None = Field(None, ge=1, le=2**32 - 1, description="How many chunks; none given: all.")
    repair: bool = Field(False, description="Have bad blocks rewritten from the other copy; the report is of before.")


class PromoteSds(Body):
    accept_data_loss: bool = False
    incomplete: bool = False
    volume_id: Reference | None = Field(None, validation_alias=AliasChoices("volume_id", "volume"))


class AddSdc(Body):
    name: Name
    ip: Name | None = None


class CreateVolume(Body):
    pool_id: Reference = aliased("pool")
    name: Name
    size_bytes: Bytes | None = None
    size_gb: Gigabytes | None = None
    size: SizeText | None = None
    provisioning: Text = "thin"

    def size_required(self) -> int:
        return required_size("size", self.size_bytes, self.size_gb, self.size)


class UnmapVolume(Body):
    volume_id: Reference = aliased("volume")
    sdc_id: Reference = aliased("sdc")


class MapVolume(UnmapVolume):
    access_mode: Literal["readWrite", "readOnly"] = "readWrite"
    iops_limit: Limit = 0
    bandwidth_limit_mbps: Limit = 0


class ExtendVolume(Body):
    """``additional`` or ``new_size``, each as bytes, GB or text."""

    volume_id: Reference = aliased("volume")
    additional_bytes: Bytes | None = None
    additional_gb: Gigabytes | None = None
    additional: SizeText | None = None
    new_size_bytes: Bytes | None = None
    new_size_gb: Gigabytes | None = None
    new_size: SizeText | None = None

    def new_size_of(self, size_bytes: int) -> int:
        """The whole size that is asked for, of a volume that has ``size_bytes``."""
        additional = one_size("additional", self.additional_bytes, self.additional_gb, self.additional)
        new_size = one_size("new_size", self.new_size_bytes, self.new_size_gb, self.new_size)
        if (additional is None) == (new_size is None):
            raise InvalidError("give either additional_bytes (additional_gb) or new_size_bytes (new_size_gb)")
        if new_size is not None:
            return new_size
        if not additional:
            raise InvalidError("an extension by nothing: additional_bytes must be more than 0")
        return size_bytes + additional


class Answer(BaseModel):
    """An object that is answered. What a view gives beyond the schema is a bug, and found."""

    model_config = ConfigDict(extra="forbid")


class Problem(Answer):
    type: str
    code: str
    title: str
    status: int
    detail: str
    details: dict[str, Any]


class Named(Answer):
    id: str
    name: str


class Deleted(Named):
    """``deleted`` false: it is on its way, see the object's own state."""

    deleted: bool


class PoolSummary(Named):
    health: Health


class SdsSummary(Named):
    state: str


class Pd(Named):
    description: str
    pool_count: int
    fault_set_count: int
    sds_count: int
    total_capacity_bytes: int
    total_capacity_gb: float
    created_at: datetime
    pools: list[PoolSummary]
    fault_sets: list[Named]
    sds: list[SdsSummary]


class FaultSet(Named):
    pd_id: str
    pd_name: str
    sds_count: int
    sds: list[SdsSummary]
    created_at: datetime


class Pool(Named):
    pd_id: str
    pd_name: str
    policy: str
    durability: str
    total_capacity_bytes: int
    total_capacity_gb: float
    used_capacity_bytes: int
    used_capacity_gb: float
    reserved_capacity_bytes: int
    reserved_capacity_gb: float
    free_capacity_bytes: int
    free_capacity_gb: float
    provisioned_capacity_bytes: int
    provisioned_capacity_gb: float
    health: Health
    rebuild_state: RebuildState
    rebuild_progress_percent: float
    rebuild_rate_limit_mbps: int
    rebuild_delay_seconds: int
    spare_percent: int
    volume_count: int
    sds_count: int
    chunk_count: int
    degraded_chunk_count: int
    failed_chunk_count: int
    created_at: datetime


class PoolHealth(Named):
    health: Health
    reasons: list[str]
    sds_up: int
    sds_down: int
    volume_count: int
    chunk_count: int
    degraded_chunk_count: int
    failed_chunk_count: int
    rebuild_state: RebuildState
    rebuild_progress_percent: float


class Rebuild(Answer):
    """``bytes_rebuilt`` of ``total_bytes``, which is an estimate until the rebuild is complete."""

    pool_id: str
    pool_name: str
    state: RebuildState
    reason: str | None
    progress_percent: float
    bytes_rebuilt: int
    total_bytes: int
    total_gb: float
    rate_mbps: float
    rebuild_rate_limit_mbps: int
    estimated_time_remaining_seconds: float | None
    degraded_chunks: int


class FailedDevice(Answer):
    index: int
    message: str


class Faults(Answer):
    """What an SDS is made to suffer on purpose; counters since its process began."""

    failed: bool
    until: datetime | None
    rules: list[str]
    errors_injected: int
    delays_injected: int
    blocks_corrupted: int


class Sds(Named):
    pd_id: str
    pd_name: str
    fault_set_id: str | None
    fault_set_name: str | None
    state: Literal["UP", "DOWN", "DEGRADED"]
    serving: bool  # has registered since this MDM started, with all its devices, and is connected
    connected: bool  # to the MDM, whether it serves or not
    removing: bool
    node: str
    ip: str | None
    data_address: str | None
    http_address: str | None
    total_capacity_bytes: int
    total_capacity_gb: float
    used_capacity_bytes: int
    used_capacity_gb: float
    device_count: int
    failed_devices: list[FailedDevice]
    faults: Faults
    chunk_count: int
    primary_chunk_count: int
    incarnation: int
    created_at: datetime


class Promoted(Named):
    """How many chunks the SDS serves alone now because it was told to, and of how many of these it has every
    acknowledged write."""

    chunks: int
    member_chunks: int


class Mapping(Answer):
    """A mapping as its volume shows it."""

    sdc_id: str
    sdc_name: str
    access_mode: Literal["readWrite", "readOnly"]
    iops_limit: int
    bandwidth_limit_mbps: int
    created_at: datetime


class MappedVolume(Answer):
    """A mapping as its SDC shows it."""

    volume_id: str
    volume_name: str
    size_bytes: int
    size_gb: float
    access_mode: Literal["readWrite", "readOnly"]
    iops_limit: int
    bandwidth_limit_mbps: int


class Sdc(Named):
    ip: str | None
    connected: bool
    incarnation: int
    mapping_count: int
    mappings: list[MappedVolume]
    created_at: datetime


class Volume(Named):
    pool_id: str
    pool_name: str
    provisioning: Literal["thin", "thick"]
    size_bytes: int
    size_gb: float
    used_capacity_bytes: int
    used_capacity_gb: float
    state: Literal["CREATING", "AVAILABLE", "IN_USE", "DEGRADED", "FAILED", "DELETING"]
    health: Health
    reasons: list[str]
    chunk_count: int
    degraded_chunk_count: int
    failed_chunk_count: int
    mapping_count: int
    mappings: list[Mapping]
    created_at: datetime


class Replica(Answer):
    sds_id: str
    sds_name: str
    role: Literal["primary", "secondary"]
    is_available: bool
    is_rebuilding: bool


class Chunk(Answer):
    index: int
    epoch: int
    is_degraded: bool
    replicas: list[Replica]


class VerifyProblem(Answer):
    """One difference. ``block`` None: the whole chunk; ``sds_id`` None: both copies, or none in particular."""

    chunk: int
    block: int | None
    problem: str
    sds_id: str | None
    sds_name: str | None
    detail: str


class VerifyReport(Answer):
    """``problems`` holds the first ones, ``problem_count`` counts them all."""

    volume_id: str
    name: str
    chunks_checked: int
    blocks_checked: int
    problem_count: int
    problems: list[VerifyProblem]


class Event(Answer):
    id: int
    time: datetime
    type: str
    message: str
    pd_id: str | None
    pool_id: str | None
    volume_id: str | None
    sds_id: str | None
    sdc_id: str | None
    details: dict[str, Any]


class SystemStatus(Answer):
    cluster_id: str
    version: str
    health: Health
    reasons: list[str]
    pd_count: int
    pool_count: int
    pools_degraded: int
    pools_failed: int
    sds_count: int
    sds_up: int
    sds_down: int
    sdc_count: int
    sdc_connected: int
    volume_count: int
    total_capacity_bytes: int
    total_capacity_gb: float
    used_capacity_bytes: int
    used_capacity_gb: float
    free_capacity_bytes: int
    free_capacity_gb: float


class Alive(Answer):
    status: Literal["ok"]
    version: str
