"""What every route gets: the orchestrator, and a view of the current state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from mdm.views import View
from pfvol.errors import InvalidError

if TYPE_CHECKING:
    from mdm.commands import Command
    from mdm.orchestrator import Orchestrator

# A name that is also a word of a route would hide its object: GET /vol/list is the list.
RESERVED_NAMES = frozenset({"list"})


class Admin:
    """The admin path of one request."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self.orchestrator = orchestrator

    @property
    def view(self) -> View:
        """Of the state as it is now."""
        return View(self.orchestrator.manager.state, self.orchestrator.membership)

    async def execute(self, command: Command) -> tuple[View, Any]:
        """Runs a command; a view of the state that it made, and its result (the new object's id, where there is one).

        Of that state and not of the current one: what the command made may be gone again by now.
        """
        outcome = await self.orchestrator.execute(command)
        return View(outcome.state, self.orchestrator.membership), outcome.result


async def _admin(request: Request) -> Admin:
    return Admin(request.app.state.orchestrator)


AdminDep = Annotated[Admin, Depends(_admin)]


def new_name(name: str) -> str:
    """``name`` for an object to be made; whether it is legal otherwise is the core's rule."""
    if name in RESERVED_NAMES:
        raise InvalidError(f"{name!r} cannot be a name: it is a word of the REST routes")
    return name
