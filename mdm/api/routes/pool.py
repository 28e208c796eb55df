"""``/pool``: storage pools."""

from __future__ import annotations

from fastapi import APIRouter

from mdm import commands
from mdm.api import schemas
from mdm.api.context import AdminDep, new_name
from mdm.identity import Kind
from mdm.views import Object

router = APIRouter(prefix="/pool", tags=["pool"])

OPTIONAL = ("rebuild_rate_limit_mbps", "rebuild_delay_seconds", "spare_percent")


@router.post("/create", status_code=201, response_model=schemas.Pool)
async def create(body: schemas.CreatePool, admin: AdminDep) -> Object:
    given = {key: value for key in OPTIONAL if (value := getattr(body, key)) is not None}
    view, pool_id = await admin.execute(
        commands.CreatePool(
            pd_id=admin.view.find(Kind.PD, body.pd_id),
            name=new_name(body.name),
            capacity_bytes=body.capacity_required(),
            policy=body.policy,
            durability=body.durability,
            **given,
        )
    )
    return view.pool(view.state.pools[pool_id])


@router.get("/list", response_model=list[schemas.Pool])
async def list_(admin: AdminDep, pd_id: str | None = None) -> list[Object]:
    view = admin.view
    wanted = None if pd_id is None else view.find(Kind.PD, pd_id)
    return [view.pool(pool) for pool in view.state.pools.values() if wanted in (None, pool.pd_id)]


@router.get("/{pool}", response_model=schemas.Pool)
async def show(pool: str, admin: AdminDep) -> Object:
    view = admin.view
    return view.pool(view.state.pools[view.find(Kind.POOL, pool)])


@router.get("/{pool}/health", response_model=schemas.PoolHealth)
async def health(pool: str, admin: AdminDep) -> Object:
    view = admin.view
    return view.pool_health(view.state.pools[view.find(Kind.POOL, pool)])


@router.patch("/{pool}", response_model=schemas.Pool)
async def update(pool: str, body: schemas.UpdatePool, admin: AdminDep) -> Object:
    pool_id = admin.view.find(Kind.POOL, pool)
    view, _ = await admin.execute(
        commands.UpdatePool(
            pool_id=pool_id,
            name=None if body.name is None else new_name(body.name),
            capacity_bytes=body.capacity_or_none(),
            policy=body.policy,
            durability=body.durability,
            rebuild_rate_limit_mbps=body.rebuild_rate_limit_mbps,
            rebuild_delay_seconds=body.rebuild_delay_seconds,
            spare_percent=body.spare_percent,
        )
    )
    return view.pool(view.state.pools[pool_id])


@router.delete("/{pool}", response_model=schemas.Deleted)
async def delete(pool: str, admin: AdminDep) -> Object:
    view = admin.view
    pool_id = view.find(Kind.POOL, pool)
    name = view.state.pools[pool_id].name
    await admin.execute(commands.DeletePool(pool_id=pool_id))
    return {"id": view.id_of(Kind.POOL, pool_id), "name": name, "deleted": True}
