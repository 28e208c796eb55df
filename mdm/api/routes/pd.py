"""``/pd``: protection domains."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from mdm import commands
from mdm.api import schemas
from mdm.api.context import AdminDep, new_name
from mdm.identity import Kind
from mdm.views import Object

router = APIRouter(prefix="/pd", tags=["protection domain"])


@router.post("/create", status_code=201, response_model=schemas.Pd)
async def create(body: schemas.CreatePd, admin: AdminDep) -> Object:
    view, pd_id = await admin.execute(
        commands.CreateProtectionDomain(name=new_name(body.name), description=body.description)
    )
    return view.pd(view.state.pds[pd_id])


@router.get("/list", response_model=list[schemas.Pd])
async def list_(admin: AdminDep) -> list[Object]:
    view = admin.view
    return [view.pd(pd) for pd in view.state.pds.values()]


@router.get("/{pd}", response_model=schemas.Pd)
async def show(pd: str, admin: AdminDep) -> Object:
    view = admin.view
    return view.pd(view.state.pds[view.find(Kind.PD, pd)])


@router.delete("/{pd}", response_model=schemas.Deleted)
async def delete(
    pd: str,
    admin: AdminDep,
    cascade: Annotated[bool, Query(description="With all that is in it, unless a volume is mapped.")] = True,
) -> Object:
    view = admin.view
    pd_id = view.find(Kind.PD, pd)
    name = view.state.pds[pd_id].name
    await admin.execute(commands.DeleteProtectionDomain(pd_id=pd_id, cascade=cascade))
    return {"id": view.id_of(Kind.PD, pd_id), "name": name, "deleted": True}
