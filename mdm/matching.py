"""Places for copies: demands matched to room, as many as possible, at the least penalty. Pure.

A demand is a number of copies that must not lie on one certain SDS (nor where ``penalty`` says None); a target has room
for a number of copies. There are as many demands as SDSs, however many chunks there are, so a minimum-cost flow in
plain Python takes milliseconds. As much as possible of each demand is first spread over the targets by their room,
which is what a rebuild wants (many sources, many targets); paths through what was placed so far then find a place for
every rest that has one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

Penalty = Callable[[int, int], int | None]
"""(demand, target) -> 0: good, 1: to be avoided, None: never."""


def match(demands: Mapping[int, int], room: Mapping[int, int], penalty: Penalty) -> dict[tuple[int, int], int]:
    """Copies per (demand, target): as many as can be placed, with the least sum of penalties among such."""
    flow = _Flow(demands, room, penalty)
    flow.spread()
    while flow.augment():
        pass
    return {pair: count for pair, count in flow.placed.items() if count}


def deal(count: int, weights: Sequence[int]) -> list[int]:
    """``count`` cut into whole parts in proportion to ``weights``, of which one is not 0. No part exceeds its weight
    unless ``count`` exceeds their sum."""
    total = sum(weights)
    parts = [count * weight // total for weight in weights]
    odd = count - sum(parts)
    for index in sorted(range(len(weights)), key=lambda index: -(count * weights[index] % total))[:odd]:
        parts[index] += 1
    return parts


class _Flow:
    """``left`` of each demand and ``room`` of each target are what is not placed yet."""

    def __init__(self, demands: Mapping[int, int], room: Mapping[int, int], penalty: Penalty) -> None:
        self.left = {demand: count for demand, count in demands.items() if count > 0}
        self.room = {target: slots for target, slots in room.items() if slots > 0}
        self.cost = {
            (demand, target): cost
            for demand in self.left
            for target in self.room
            if (cost := penalty(demand, target)) is not None
        }
        self.placed: dict[tuple[int, int], int] = {}

    def spread(self) -> None:
        """Places without any penalty what goes by share. Whatever it places, ``augment`` can move."""
        wanted: dict[tuple[int, int], int] = {}
        for demand, count in self.left.items():
            good = [target for target in self.room if self.cost.get((demand, target)) == 0]
            if good:
                shares = deal(count, [self.room[target] for target in good])
                wanted.update({(demand, target): share for target, share in zip(good, shares, strict=True)})
        asked = dict.fromkeys(self.room, 0)
        for (_, target), share in wanted.items():
            asked[target] += share
        room = dict(self.room)
        for (demand, target), share in wanted.items():
            fits = share if asked[target] <= room[target] else share * room[target] // asked[target]
            if fits:
                self._place(demand, target, fits)
                self.left[demand] -= fits
                self.room[target] -= fits

    def augment(self) -> bool:
        """Places more of one demand along the cheapest path; False when nothing more can be placed."""
        cost, came = self._paths()
        ends = [target for target, slots in self.room.items() if slots and ("to", target) in cost]
        if not ends:
            return False
        end = min(ends, key=lambda target: cost["to", target])
        path = [("to", end)]
        while path[-1] in came:
            path.append(came[path[-1]])
        path.reverse()  # demand, target, demand, target, ...: every second step takes back what was placed
        start = path[0][1]
        amount = min(self.left[start], self.room[end])
        for (_, target), (_, demand) in zip(path[1:-1:2], path[2::2], strict=True):
            amount = min(amount, self.placed[demand, target])
        for (_, demand), (_, target) in zip(path[0::2], path[1::2], strict=True):
            self._place(demand, target, amount)
        for (_, target), (_, demand) in zip(path[1:-1:2], path[2::2], strict=True):
            self._place(demand, target, -amount)
        self.left[start] -= amount
        self.room[end] -= amount
        return True

    def _paths(self) -> tuple[dict[tuple[str, int], int], dict[tuple[str, int], tuple[str, int]]]:
        """The least cost from any demand that is left, and the step before (Bellman-Ford: taking back costs less)."""
        targets_of: dict[int, list[int]] = {}
        for demand, target in self.cost:
            targets_of.setdefault(demand, []).append(target)
        holders_of: dict[int, list[int]] = {}
        for (demand, target), count in self.placed.items():
            if count:
                holders_of.setdefault(target, []).append(demand)
        cost = {("from", demand): 0 for demand, count in self.left.items() if count}
        came: dict[tuple[str, int], tuple[str, int]] = {}
        queue = deque(cost)
        while queue:
            node = queue.popleft()
            side, number = node
            if side == "from":
                steps = [(("to", target), self.cost[number, target]) for target in targets_of.get(number, ())]
            else:
                steps = [(("from", demand), -self.cost[demand, number]) for demand in holders_of.get(number, ())]
            for step, price in steps:
                if step not in cost or cost[node] + price < cost[step]:
                    cost[step] = cost[node] + price
                    came[step] = node
                    queue.append(step)
        return cost, came

    def _place(self, demand: int, target: int, count: int) -> None:
        self.placed[demand, target] = self.placed.get((demand, target), 0) + count
