"""Breadth-first search of a protocol: the shortest way to an error, or the number of states that have none."""

from dataclasses import dataclass

from tests.model.protocol import Protocol, State


@dataclass(frozen=True)
class Found:
    states: int
    depth: int
    error: str  # empty: there is none in any state
    steps: tuple[str, ...]  # that led to it

    def __str__(self) -> str:
        counted = f"{self.states} states, depth {self.depth}"
        if not self.error:
            return f"{counted}, no error"
        lines = "".join(f"\n  {number}. {step}" for number, step in enumerate(self.steps, 1))
        return f"{counted}: {self.error}{lines}"


def search(protocol: Protocol, states_max: int) -> Found:
    """Raises ``RuntimeError`` when there are more than ``states_max`` states: then nothing is known."""
    start = protocol.start()
    came_from: dict[State, State | None] = {start: None}
    level = [start]
    depth = 0
    while level:
        following = []
        for state in level:
            for _, after in protocol.successors(state):
                if after in came_from:
                    continue
                came_from[after] = state
                following.append(after)
                error = protocol.error(after)
                if error:
                    return Found(len(came_from), depth + 1, error, _way(protocol, came_from, after))
        if len(came_from) > states_max:
            raise RuntimeError(f"more than {states_max} states after {depth + 1} steps")
        level = following
        depth += bool(following)
    return Found(len(came_from), depth, "", ())


def _way(protocol: Protocol, came_from: dict[State, State | None], state: State) -> tuple[str, ...]:
    steps = []
    while (before := came_from[state]) is not None:
        step = next(step for step, after in protocol.successors(before) if after == state)
        shown = ", ".join(f"{i} shows {value}" for i, value in protocol.shown(state).items())
        steps.append(f"{step}; {shown or 'nobody shows anything'}")
        state = before
    return tuple(reversed(steps))
