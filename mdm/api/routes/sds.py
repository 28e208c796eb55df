"""``/sds``: storage servers."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter

from mdm import commands, faults
from mdm.api import schemas
from mdm.api.context import AdminDep, new_name
from mdm.identity import Kind
from mdm.views import Object
from pfvol.errors import InvalidError
from pfvol.faults import FULL_DISK, parse_delay, parse_error, parse_place

router = APIRouter(prefix="/sds", tags=["SDS"])


@router.post("/add", status_code=201, response_model=schemas.Sds)
async def add(body: schemas.AddSds, admin: AdminDep) -> Object:
    view = admin.view
    view, sds_id = await admin.execute(
        commands.AddSds(
            pd_id=view.find(Kind.PD, body.pd_id),
            name=new_name(body.name),
            capacity_bytes=body.capacity_required(),
            fault_set_id=None if body.fault_set_id is None else view.find(Kind.FAULT_SET, body.fault_set_id),
            node=body.node,
            ip=body.ip,
            devices=tuple(body.devices),
        )
    )
    return view.sds(view.state.sds[sds_id])


@router.get("/list", response_model=list[schemas.Sds])
async def list_(admin: AdminDep, pd_id: str | None = None) -> list[Object]:
    view = admin.view
    wanted = None if pd_id is None else view.find(Kind.PD, pd_id)
    return [view.sds(sds) for sds in view.state.sds.values() if wanted in (None, sds.pd_id)]


@router.get("/{sds}", response_model=schemas.Sds)
async def show(sds: str, admin: AdminDep) -> Object:
    view = admin.view
    return view.sds(view.state.sds[view.find(Kind.SDS, sds)])


@router.delete("/{sds}", response_model=schemas.Deleted)
async def remove(sds: str, admin: AdminDep) -> Object:
    """``deleted`` is false for an SDS with copies: they move elsewhere, then it goes."""
    view = admin.view
    sds_id = view.find(Kind.SDS, sds)
    name = view.state.sds[sds_id].name
    _, gone = await admin.execute(commands.RemoveSds(sds_id=sds_id))
    return {"id": view.id_of(Kind.SDS, sds_id), "name": name, "deleted": gone}


@router.post("/{sds}/keep", response_model=schemas.Sds)
async def keep(sds: str, admin: AdminDep) -> Object:
    """Takes a removal back; what has moved already stays where it is."""
    sds_id = admin.view.find(Kind.SDS, sds)
    view, _ = await admin.execute(commands.KeepSds(sds_id=sds_id))
    return view.sds(view.state.sds[sds_id])


@router.post("/{sds}/fail", response_model=schemas.Sds)
async def fail(sds: str, admin: AdminDep, body: schemas.FailSds | None = None) -> Object:
    """It really stops: connections are cut, nothing is served, until ``recover`` or the duration's end."""
    sds_id = admin.view.find(Kind.SDS, sds)
    await faults.fail(admin.orchestrator, sds_id, None if body is None else body.duration)
    return _row(admin, sds_id)


@router.post("/{sds}/recover", response_model=schemas.Sds)
async def recover(sds: str, admin: AdminDep) -> Object:
    """Ends a failure; devices that are out of service are opened anew."""
    sds_id = admin.view.find(Kind.SDS, sds)
    await faults.recover(admin.orchestrator, sds_id)
    return _row(admin, sds_id)


@router.post("/{sds}/inject", response_model=schemas.Sds)
async def inject(sds: str, body: schemas.InjectFaults, admin: AdminDep) -> Object:
    """Faults of its disks."""
    sds_id = admin.view.find(Kind.SDS, sds)
    errors = [parse_error(text) for text in body.errors] + list(FULL_DISK * body.full)
    delays = [parse_delay(text) for text in body.delays]
    places = [parse_place(text) for text in body.corrupt]
    if not (errors or delays or places or body.clear):
        raise InvalidError("nothing to inject: give errors, delays, corrupt, full or clear")
    await faults.inject(admin.orchestrator, sds_id, errors=errors, delays=delays, places=places, clear=body.clear)
    return _row(admin, sds_id)


def _row(admin: AdminDep, sds_id: int) -> Object:
    """As it is now; an SDS that was removed meanwhile is not found."""
    view = admin.view
    return view.sds(view.state.sds[view.find(Kind.SDS, view.id_of(Kind.SDS, sds_id))])


@router.post("/{sds}/promote", response_model=schemas.Promoted)
async def promote(sds: str, body: schemas.PromoteSds, admin: AdminDep) -> Object:
    """Makes an older copy serve where the newer ones are gone. Refused without ``accept_data_loss``, with what would
    be lost; also while something still listens where the SDSs with the newer copies were."""
    view = admin.view
    sds_id = view.find(Kind.SDS, sds)
    command = commands.ForceAlone(
        sds_id=sds_id,
        volume_id=None if body.volume_id is None else view.find(Kind.VOLUME, body.volume_id),
        incomplete=body.incomplete,
        accepted=body.accept_data_loss,
    )
    view, forced = await admin.execute(command)
    if not forced.chunks:  # Says why, and what there might be instead.
        await admin.execute(replace(command, accepted=False))
    return {"id": view.id_of(Kind.SDS, sds_id), "name": view.state.sds[sds_id].name, **forced._asdict()}
