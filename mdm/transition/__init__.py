"""The only way the state changes: ``apply(state, command, now)``. Pure: no clock, no randomness, no IO.

A command either gives the next state whole, or raises a ``pfvol.errors.Error`` and leaves no trace. One that finds
nothing to do gives the same state back and no events.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

from mdm import commands
from mdm.commands import Command
from mdm.events import Event
from mdm.model import State
from mdm.transition import forced, nodes, sets, topology, volumes
from mdm.transition.draft import Change, Draft

__all__ = ["Change", "Transition", "apply"]


class Transition(NamedTuple):
    """The next state, what to tell, what the command answers, and the rows to write."""

    state: State
    events: tuple[Event, ...]
    result: Any
    changes: tuple[Change, ...]


_HANDLERS: dict[type, Callable[[Draft, Any], Any]] = {
    commands.CreateProtectionDomain: topology.create_pd,
    commands.DeleteProtectionDomain: topology.delete_pd,
    commands.CreateFaultSet: topology.create_fault_set,
    commands.DeleteFaultSet: topology.delete_fault_set,
    commands.CreatePool: topology.create_pool,
    commands.UpdatePool: topology.update_pool,
    commands.DeletePool: topology.delete_pool,
    commands.StartRebuild: topology.start_rebuild,
    commands.CancelRebuild: topology.cancel_rebuild,
    commands.TellRebuild: topology.tell_rebuild,
    commands.TellRepairs: nodes.tell_repairs,
    commands.TellFaults: nodes.tell_faults,
    commands.AddSds: nodes.add_sds,
    commands.RemoveSds: nodes.remove_sds,
    commands.KeepSds: nodes.keep_sds,
    commands.AddSdc: nodes.add_sdc,
    commands.RemoveSdc: nodes.remove_sdc,
    commands.CreateVolume: volumes.create_volume,
    commands.ExtendVolume: volumes.extend_volume,
    commands.DeleteVolume: volumes.delete_volume,
    commands.MapVolume: volumes.map_volume,
    commands.UnmapVolume: volumes.unmap_volume,
    commands.RegisterSds: nodes.register_sds,
    commands.RegisterSdc: nodes.register_sdc,
    commands.SetSdsState: nodes.set_sds_state,
    commands.VolumePurged: volumes.volume_purged,
    commands.LeaveOut: sets.leave_out,
    commands.Withdraw: sets.withdraw,
    commands.JoinLearners: sets.join_learners,
    commands.SettleMoves: sets.settle_moves,
    commands.SetLearners: sets.set_learners,
    commands.ForceAlone: forced.force_alone,
}


def apply(state: State, command: Command, now: datetime) -> Transition:
    """Carries out ``command``; ``now`` is the time that objects and events get (aware, UTC)."""
    draft = Draft(state, now)
    result = _HANDLERS[type(command)](draft, command)
    new, changes = draft.finish()
    return Transition(new, tuple(draft.events), result, changes)
