"""``/sdc``: the clients that mount volumes."""

from __future__ import annotations

from fastapi import APIRouter

from mdm import commands
from mdm.api import schemas
from mdm.api.context import AdminDep, new_name
from mdm.identity import Kind
from mdm.views import Object

router = APIRouter(prefix="/sdc", tags=["SDC"])


@router.post("/add", status_code=201, response_model=schemas.Sdc)
async def add(body: schemas.AddSdc, admin: AdminDep) -> Object:
    view, sdc_id = await admin.execute(commands.AddSdc(name=new_name(body.name), ip=body.ip))
    return view.sdc(view.state.sdc[sdc_id])


@router.get("/list", response_model=list[schemas.Sdc])
async def list_(admin: AdminDep) -> list[Object]:
    view = admin.view
    return [view.sdc(sdc) for sdc in view.state.sdc.values()]


@router.get("/{sdc}", response_model=schemas.Sdc)
async def show(sdc: str, admin: AdminDep) -> Object:
    view = admin.view
    return view.sdc(view.state.sdc[view.find(Kind.SDC, sdc)])


@router.delete("/{sdc}", response_model=schemas.Deleted)
async def remove(sdc: str, admin: AdminDep) -> Object:
    view = admin.view
    sdc_id = view.find(Kind.SDC, sdc)
    name = view.state.sdc[sdc_id].name
    await admin.execute(commands.RemoveSdc(sdc_id=sdc_id))
    return {"id": view.id_of(Kind.SDC, sdc_id), "name": name, "deleted": True}
