"""Breadth-first search of a protocol: the shortest way to an error, or the number of states that have none."""

from dataclasses import dataclass

from tests.model.protocol import Protocol, State


@dataclass(frozen=True)
class Found:
    states: int
    depth: int
    error: tuple[str, ...]  # the steps that led to it; empty: none


def search(protocol: Protocol, limit: int) -> Found:
    """Raises ``RuntimeError`` when there are more than ``limit`` states: then nothing is known."""
    start = protocol.start()
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    level = [start]
    depth = 0
    while level:
        following = []
        for state in level:
            for step, after in protocol.successors(state):
                if after in came_from:
                    continue
                came_from[after] = (state, step)
                if not after.orders:
                    return Found(len(came_from), depth + 1, _way(came_from, after))
                following.append(after)
        if len(came_from) > limit:
            raise RuntimeError(f"more than {limit} states after {depth + 1} steps")
        level = following
        depth += 1
    return Found(len(came_from), depth, ())


def _way(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    steps = []
    while (before := came_from[state]) is not None:
        state, step = before
        steps.append(step)
    return tuple(reversed(steps))
