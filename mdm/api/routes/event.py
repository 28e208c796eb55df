"""``/event``: what happened."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query

from mdm.api import schemas
from mdm.api.context import AdminDep
from mdm.views import Object

router = APIRouter(prefix="/event", tags=["event"])

EVENTS_PER_ANSWER_MAX = 10_000


@router.get("/list", response_model=list[schemas.Event])
async def list_(
    admin: AdminDep,
    since: Annotated[datetime | None, Query(description="UTC unless it says otherwise.")] = None,
    type: Annotated[str | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=EVENTS_PER_ANSWER_MAX)] = 1000,
) -> list[Object]:
    if since is not None and since.tzinfo is None:
        since = since.replace(tzinfo=UTC)
    found = await admin.orchestrator.manager.events(since=since, type=type, limit=limit)
    view = admin.view
    return [view.event(event) for event in found]
