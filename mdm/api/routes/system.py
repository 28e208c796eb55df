"""``/system`` and ``/health``: the cluster as a whole, and whether this process answers."""

from __future__ import annotations

from fastapi import APIRouter

from mdm.api import schemas
from mdm.api.context import AdminDep
from mdm.views import Object
from pfvol import __version__

router = APIRouter(tags=["system"])


@router.get("/health", response_model=schemas.Alive)
async def health() -> Object:
    """Needs no token: for load balancers and service managers."""
    return {"status": "ok", "version": __version__}


@router.get("/system/status", response_model=schemas.SystemStatus)
async def status(admin: AdminDep) -> Object:
    return admin.view.system()
