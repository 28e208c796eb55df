"""What happened, for people and programs that watch: the event types and the event itself.

Events are made by the pure core, become durable together with the change they tell of, and are numbered without gaps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class EventType(StrEnum):
    PD_CREATE = "PD_CREATE"
    PD_DELETE = "PD_DELETE"
    FAULT_SET_CREATE = "FAULT_SET_CREATE"
    FAULT_SET_DELETE = "FAULT_SET_DELETE"
    POOL_CREATE = "POOL_CREATE"
    POOL_UPDATE = "POOL_UPDATE"
    POOL_DELETE = "POOL_DELETE"
    POOL_HEALTH_CHANGE = "POOL_HEALTH_CHANGE"
    SDS_ADD = "SDS_ADD"
    SDS_REMOVE_START = "SDS_REMOVE_START"
    SDS_REMOVE_CANCEL = "SDS_REMOVE_CANCEL"
    SDS_REMOVE = "SDS_REMOVE"
    SDS_STATE_CHANGE = "SDS_STATE_CHANGE"
    SDS_FAILED = "SDS_FAILED"
    SDS_RECOVERED = "SDS_RECOVERED"
    SDS_FAULTS_INJECTED = "SDS_FAULTS_INJECTED"
    SDC_ADD = "SDC_ADD"
    SDC_REMOVE = "SDC_REMOVE"
    VOLUME_CREATE = "VOLUME_CREATE"
    VOLUME_DELETE = "VOLUME_DELETE"
    VOLUME_PURGED = "VOLUME_PURGED"
    VOLUME_MAP = "VOLUME_MAP"
    VOLUME_UNMAP = "VOLUME_UNMAP"
    VOLUME_EXTEND = "VOLUME_EXTEND"
    VOLUME_STATE_CHANGE = "VOLUME_STATE_CHANGE"
    CHUNKS_LEFT_OUT = "CHUNKS_LEFT_OUT"
    CHUNKS_JOINED = "CHUNKS_JOINED"
    DATA_LOSS_ACCEPTED = "DATA_LOSS_ACCEPTED"
    BLOCKS_REPAIRED = "BLOCKS_REPAIRED"
    BLOCKS_UNREPAIRABLE = "BLOCKS_UNREPAIRABLE"
    SLOTS_REPAIRED = "SLOTS_REPAIRED"
    SLOTS_LOST = "SLOTS_LOST"
    REBUILD_START = "REBUILD_START"
    REBUILD_PROGRESS = "REBUILD_PROGRESS"
    REBUILD_COMPLETE = "REBUILD_COMPLETE"
    REBUILD_STALLED = "REBUILD_STALLED"
    REBUILD_FAILED = "REBUILD_FAILED"
    REBUILD_CANCELLED = "REBUILD_CANCELLED"
    EVENTS_MISSED = "EVENTS_MISSED"  # only in a subscription: its reader was too slow for ``details["count"]`` events


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened; ids are those of the objects it is about."""

    event_id: int
    time: datetime
    type: EventType
    message: str
    pd_id: int | None = None
    pool_id: int | None = None
    volume_id: int | None = None
    sds_id: int | None = None
    sdc_id: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
