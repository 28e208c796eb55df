"""``/rebuild``: the copying that brings a pool's chunks back to two copies where they belong."""

from __future__ import annotations

from fastapi import APIRouter

from mdm import commands
from mdm.api import schemas
from mdm.api.context import AdminDep
from mdm.identity import Kind
from mdm.progress import UNDER_WAY
from mdm.views import Object
from pfvol.errors import ConflictError

router = APIRouter(prefix="/rebuild", tags=["rebuild"])


@router.get("/status/{pool}", response_model=schemas.Rebuild)
async def status(pool: str, admin: AdminDep) -> Object:
    view = admin.view
    return view.rebuild(view.state.pools[view.find(Kind.POOL, pool)])


@router.post("/start/{pool}", response_model=schemas.Rebuild)
async def start(pool: str, admin: AdminDep) -> Object:
    pool_id = admin.view.find(Kind.POOL, pool)
    view, _ = await admin.execute(commands.StartRebuild(pool_id=pool_id))
    return view.rebuild(view.state.pools[pool_id])


@router.post("/cancel/{pool}", response_model=schemas.Rebuild)
async def cancel(pool: str, admin: AdminDep) -> Object:
    """Refused when there is nothing to cancel: nobody should switch rebuilding off by mistake, for later."""
    view = admin.view
    pool_id = view.find(Kind.POOL, pool)
    now = view.rebuild(view.state.pools[pool_id])
    if now["state"] not in UNDER_WAY and not now["degraded_chunks"] and not view.state.pools[pool_id].rebuild_cancelled:
        raise ConflictError(f"pool {view.state.pools[pool_id].name} has nothing to rebuild: there is nothing to cancel")
    view, _ = await admin.execute(commands.CancelRebuild(pool_id=pool_id))
    return view.rebuild(view.state.pools[pool_id])
