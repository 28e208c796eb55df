"""Faults on purpose, as the MDM sees them: it has an SDS fail, recover, or suffer, and tells when any of that changed.

An SDS itself keeps what was ordered, across restarts, and says with each registration and report what is in force; of a
change there is an event, whoever brought it about (a failure may end by itself). Orders go over the control session,
which a failing SDS keeps; when it begins or ends a failure the session is ended, because a new one is to the MDM what a
new process is. What is known here is lost with the MDM's process: the first word of an SDS after that is no news.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import trio

from mdm import commands
from mdm.identity import Kind
from mdm.membership import FaultStatus, SdsRuntime
from mdm.model import SdsState
from mdm.segments import entry_of
from mdm.views import View
from pfvol.errors import ConflictError, InvalidError, NotFoundError, ProtocolError
from pfvol.faults import DiskDelay, DiskError, Place, Rules
from pfvol.log import get_logger
from pfvol.rpc.messages import Params

if TYPE_CHECKING:
    from mdm.orchestrator import Orchestrator

FAIL_TIMEOUT_SECONDS = 30.0  # the engine has to end
RECOVER_TIMEOUT_SECONDS = 110.0  # devices may have to be recovered
INJECT_TIMEOUT_SECONDS = 30.0
BACK_SECONDS_MAX = 10.0  # that an SDS which has recovered is waited for
RULES_MAX = 64
TEXT_LENGTH_MAX = 128
NUMBER_MAX = 2**63 - 1

_log = get_logger(__name__)


async def fail(orchestrator: Orchestrator, sds_id: int, seconds: float | None) -> None:
    """The SDS serves nothing any more when this returns, and is DOWN; after ``seconds``, if given, it recovers.

    Raises ConflictError when it is not connected, InvalidError for an impossible duration.
    """
    runtime = _connected(orchestrator, sds_id)
    told = await _order(runtime, "sds.fail", {"seconds": seconds}, FAIL_TIMEOUT_SECONDS)
    with trio.CancelScope(shield=True):
        await note(orchestrator, sds_id, told)
        if orchestrator.membership.sds.get(sds_id) is runtime:
            # Its engine has ended. Who knows that need not wait for its leases.
            orchestrator.membership.dead.add(sds_id)
        runtime.session.close("it fails on purpose")
        if orchestrator.membership.sds.get(sds_id) not in (None, runtime):
            return  # It has recovered by itself meanwhile, and is here again.
        sds = orchestrator.manager.state.sds.get(sds_id)
        if sds is not None and sds.state is not SdsState.DOWN:
            await orchestrator.execute(commands.SetSdsState(sds_id=sds_id, state=SdsState.DOWN))


async def recover(orchestrator: Orchestrator, sds_id: int) -> None:
    """Ends a failure, and has devices that are out of service opened anew; returns when the SDS serves, or soon after.

    Raises ConflictError when the SDS is not connected, or has nothing to recover from.
    """
    runtime = _connected(orchestrator, sds_id)
    told = await _order(runtime, "sds.recover", {}, RECOVER_TIMEOUT_SECONDS)
    with trio.CancelScope(shield=True):
        await note(orchestrator, sds_id, told)
        runtime.session.close("it recovers")
    with trio.move_on_after(BACK_SECONDS_MAX):
        while not _is_back(orchestrator, sds_id, runtime):
            changed = trio.Event()
            orchestrator.watchers.append(changed.set)
            try:
                await changed.wait()
            finally:
                orchestrator.watchers.remove(changed.set)


async def inject(
    orchestrator: Orchestrator,
    sds_id: int,
    *,
    errors: Sequence[DiskError],
    delays: Sequence[DiskDelay],
    places: Sequence[Place],
    clear: bool,
) -> None:
    """First ``clear``, then errors and delays, then blocks are corrupted; in force when this returns.

    Raises ConflictError (not connected, no such copy, not written), InvalidError, NotFoundError.
    """
    runtime = _connected(orchestrator, sds_id)
    params: Params = {
        **Rules().with_more(errors, delays).to_wire(),
        "corrupt": [_block(orchestrator, sds_id, place) for place in places],
        "clear": clear,
    }
    await note(orchestrator, sds_id, await _order(runtime, "sds.inject", params, INJECT_TIMEOUT_SECONDS))


async def note(orchestrator: Orchestrator, sds_id: int, told: FaultStatus, *, is_newest: bool = False) -> None:
    """What an SDS says is in force; of what has changed there is an event. Overtaken words are ignored."""
    before = orchestrator.membership.faults.get(sds_id)
    if before is not None and _age(told) < _age(before) and not is_newest:
        return
    orchestrator.membership.faults[sds_id] = told
    if before is None or sds_id not in orchestrator.manager.state.sds:
        return
    for command in _news(sds_id, before, told):
        await orchestrator.execute(command)


def parse_status(body: Any) -> FaultStatus:
    """What an SDS says of its faults; InvalidError when it cannot be read. Nothing said: there are none."""
    if body is None:
        return FaultStatus()
    match body:
        case {
            "revision": int(revision),
            "failed": bool(failed),
            "until_unix": None | int() | float() as until,
            "rules": [*rules],
            "errors_injected": int(errors),
            "delays_injected": int(delays),
            "blocks_corrupted": int(corrupted),
        } if (
            len(rules) <= RULES_MAX
            and all(isinstance(rule, str) and len(rule) <= TEXT_LENGTH_MAX for rule in rules)
            and all(0 <= figure <= NUMBER_MAX for figure in (revision, errors, delays, corrupted))
        ):
            try:
                ends = None if until is None else datetime.fromtimestamp(until, UTC)
            except (ValueError, OverflowError, OSError):
                raise InvalidError("faults end at a time that there is not") from None
            return FaultStatus(revision, failed, ends, tuple(rules), errors, delays, corrupted)
    raise InvalidError("faults must be told as this version of pfvol tells them")


def _age(told: FaultStatus) -> tuple[int, int]:
    """Words of one process in order: corrupting raises no revision."""
    return told.revision, told.blocks_corrupted


def _news(sds_id: int, before: FaultStatus, now: FaultStatus) -> Iterator[commands.TellFaults]:
    if now.failed and (not before.failed or now.until != before.until):
        until = None if now.until is None else now.until.isoformat()
        message = "fails on purpose until it is recovered" if until is None else f"fails on purpose until {until}"
        yield commands.TellFaults(sds_id=sds_id, what="failed", message=message, details={"until": until})
    if before.failed and not now.failed:
        yield commands.TellFaults(sds_id=sds_id, what="recovered", message="fails on purpose no more")
    if now.rules != before.rules:
        message = f"has disks with faults on purpose: {', '.join(now.rules)}"
        if not now.rules:
            message = "has no faults of its disks on purpose any more"
        yield commands.TellFaults(sds_id=sds_id, what="injected", message=message, details={"rules": [*now.rules]})
    if (more := now.blocks_corrupted - before.blocks_corrupted) > 0:
        message = f"has corrupted {more} block{'s' * (more > 1)} of its own on purpose"
        yield commands.TellFaults(sds_id=sds_id, what="injected", message=message, details={"blocks_corrupted": more})


def _connected(orchestrator: Orchestrator, sds_id: int) -> SdsRuntime:
    runtime = orchestrator.membership.sds.get(sds_id)
    if runtime is None:
        sds = orchestrator.manager.state.sds[sds_id]
        raise ConflictError(f"SDS {sds.name} is not reachable: its node {sds.node} is not connected to the MDM")
    return runtime


async def _order(runtime: SdsRuntime, method: str, params: Params, seconds: float) -> FaultStatus:
    try:
        return parse_status(await runtime.session.call(method, params, timeout=seconds))
    except InvalidError as error:
        if error.message.startswith("faults"):
            raise ProtocolError(error.message) from None
        raise


def _is_back(orchestrator: Orchestrator, sds_id: int, than: SdsRuntime) -> bool:
    runtime = orchestrator.membership.sds.get(sds_id)
    sds = orchestrator.manager.state.sds.get(sds_id)
    if sds is None or runtime is None or runtime is than:
        return sds is None
    return runtime.serving and sds.state is not SdsState.DOWN


def _block(orchestrator: Orchestrator, sds_id: int, place: Place) -> list[int]:
    """[volume, chunk, block] of a place of which this SDS has a copy."""
    state = orchestrator.manager.state
    name = state.sds[sds_id].name
    if place.volume is None:
        here = [volume for volume in state.volumes.values() if volume.uses(sds_id)]
        if len(here) != 1:
            choices = ", ".join(sorted(volume.name for volume in here)[:5]) or "none"
            raise InvalidError(f"name the volume: VOLUME/{place.chunk}:{place.block} (on SDS {name}: {choices})")
        volume = here[0]
    else:
        volume = state.volumes[View(state, orchestrator.membership).find(Kind.VOLUME, place.volume)]
    if place.chunk >= volume.chunks:
        raise NotFoundError(f"volume {volume.name} has chunks 0 to {volume.chunks - 1}, not {place.chunk}")
    roles = entry_of(state.maps[volume.volume_id], place.chunk).roles
    if sds_id not in roles.holders.members:
        others = ", ".join(state.sds[other].name for other in roles.holders.members)
        raise ConflictError(f"SDS {name} has no copy of chunk {place.chunk} of {volume.name}: {others} have")
    return [volume.volume_id, place.chunk, place.block]
