"""``/fault-set``: fault sets."""

from __future__ import annotations

from fastapi import APIRouter

from mdm import commands
from mdm.api import schemas
from mdm.api.context import AdminDep, new_name
from mdm.identity import Kind
from mdm.views import Object

router = APIRouter(prefix="/fault-set", tags=["fault set"])


@router.post("/create", status_code=201, response_model=schemas.FaultSet)
async def create(body: schemas.CreateFaultSet, admin: AdminDep) -> Object:
    pd_id = admin.view.find(Kind.PD, body.pd_id)
    view, fault_set_id = await admin.execute(commands.CreateFaultSet(pd_id=pd_id, name=new_name(body.name)))
    return view.fault_set(view.state.fault_sets[fault_set_id])


@router.get("/list", response_model=list[schemas.FaultSet])
async def list_(admin: AdminDep, pd_id: str | None = None) -> list[Object]:
    view = admin.view
    wanted = None if pd_id is None else view.find(Kind.PD, pd_id)
    return [view.fault_set(item) for item in view.state.fault_sets.values() if wanted in (None, item.pd_id)]


@router.get("/{fault_set}", response_model=schemas.FaultSet)
async def show(fault_set: str, admin: AdminDep) -> Object:
    view = admin.view
    return view.fault_set(view.state.fault_sets[view.find(Kind.FAULT_SET, fault_set)])


@router.delete("/{fault_set}", response_model=schemas.Deleted)
async def delete(fault_set: str, admin: AdminDep) -> Object:
    view = admin.view
    fault_set_id = view.find(Kind.FAULT_SET, fault_set)
    name = view.state.fault_sets[fault_set_id].name
    await admin.execute(commands.DeleteFaultSet(fault_set_id=fault_set_id))
    return {"id": view.id_of(Kind.FAULT_SET, fault_set_id), "name": name, "deleted": True}
