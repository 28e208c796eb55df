"""``/vol``: volumes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from mdm import commands
from mdm.api import schemas
from mdm.api.context import AdminDep, new_name
from mdm.identity import Kind
from mdm.views import Object, View
from pfvol.constants import SEGMENT_CHUNKS

router = APIRouter(prefix="/vol", tags=["volume"])

# More would hold the MDM's loop for too long: the answer is built without a pause.
CHUNKS_PER_ANSWER_MAX = SEGMENT_CHUNKS


def _shown(view: View, volume_id: int) -> Object:
    return view.volume(view.state.volumes[volume_id])


@router.post("/create", status_code=201, response_model=schemas.Volume)
async def create(body: schemas.CreateVolume, admin: AdminDep) -> Object:
    view, volume_id = await admin.execute(
        commands.CreateVolume(
            pool_id=admin.view.find(Kind.POOL, body.pool_id),
            name=new_name(body.name),
            size_bytes=body.size_required(),
            provisioning=body.provisioning,
        )
    )
    return _shown(view, volume_id)


@router.post("/map", response_model=schemas.Volume)
async def map_(body: schemas.MapVolume, admin: AdminDep) -> Object:
    view = admin.view
    volume_id = view.find(Kind.VOLUME, body.volume_id)
    view, _ = await admin.execute(
        commands.MapVolume(
            volume_id=volume_id,
            sdc_id=view.find(Kind.SDC, body.sdc_id),
            access_mode=body.access_mode,
            iops_limit=body.iops_limit,
            bandwidth_limit_mbps=body.bandwidth_limit_mbps,
        )
    )
    return _shown(view, volume_id)


@router.post("/unmap", response_model=schemas.Volume)
async def unmap(body: schemas.UnmapVolume, admin: AdminDep) -> Object:
    view = admin.view
    volume_id = view.find(Kind.VOLUME, body.volume_id)
    view, _ = await admin.execute(commands.UnmapVolume(volume_id=volume_id, sdc_id=view.find(Kind.SDC, body.sdc_id)))
    return _shown(view, volume_id)


@router.post("/extend", response_model=schemas.Volume)
async def extend(body: schemas.ExtendVolume, admin: AdminDep) -> Object:
    view = admin.view
    volume_id = view.find(Kind.VOLUME, body.volume_id)
    # Of two additions at once the second computes a size that is no extension any more: the core refuses it.
    size_bytes = body.new_size_of(view.state.volumes[volume_id].size_bytes)
    view, _ = await admin.execute(commands.ExtendVolume(volume_id=volume_id, size_bytes=size_bytes))
    return _shown(view, volume_id)


@router.get("/list", response_model=list[schemas.Volume])
async def list_(admin: AdminDep, pool_id: str | None = None) -> list[Object]:
    view = admin.view
    wanted = None if pool_id is None else view.find(Kind.POOL, pool_id)
    return [view.volume(volume) for volume in view.state.volumes.values() if wanted in (None, volume.pool_id)]


@router.get("/{volume}", response_model=schemas.Volume)
async def show(volume: str, admin: AdminDep) -> Object:
    view = admin.view
    return _shown(view, view.find(Kind.VOLUME, volume))


@router.get("/{volume}/chunks", response_model=list[schemas.Chunk])
async def chunks(
    volume: str,
    admin: AdminDep,
    first: Annotated[int, Query(ge=0, description="Index of the first chunk.")] = 0,
    count: Annotated[int, Query(ge=1, le=CHUNKS_PER_ANSWER_MAX)] = CHUNKS_PER_ANSWER_MAX,
) -> list[Object]:
    view = admin.view
    return list(view.chunks(view.state.volumes[view.find(Kind.VOLUME, volume)], first, count))


@router.post("/{volume}/verify", response_model=schemas.VerifyReport)
async def verify(volume: str, admin: AdminDep, body: schemas.VerifyVolume | None = None) -> Object:
    view = admin.view
    volume_id = view.find(Kind.VOLUME, volume)
    asked = schemas.VerifyVolume.model_validate({}) if body is None else body
    report = await admin.orchestrator.verify_volume(volume_id, asked.first, asked.count, repair=asked.repair)
    return view.verify_report(volume_id, view.state.volumes[volume_id].name, report)


@router.delete("/{volume}", response_model=schemas.Deleted)
async def delete(volume: str, admin: AdminDep) -> Object:
    view = admin.view
    volume_id = view.find(Kind.VOLUME, volume)
    name = view.state.volumes[volume_id].name
    await admin.execute(commands.DeleteVolume(volume_id=volume_id))
    return {"id": view.id_of(Kind.VOLUME, volume_id), "name": name, "deleted": True}
