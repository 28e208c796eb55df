"""What clients may see of a block: some order of their calls that one register could have carried out.

Owns the set of all such orders of the calls so far. The protocol is in error when a call has a result that leaves none.
A read is one instant: whatever a longer one could see, one of these instants sees, and earlier ends only ask for more.
"""

from typing import NamedTuple


class Order(NamedTuple):
    value: int
    done: int  # one bit per client: its open write has happened


Orders = frozenset[Order]
Open = tuple[tuple[int, int, bool], ...]  # (client, value of its open write, whether it may happen more than once)

FRESH: Orders = frozenset({Order(0, 0)})


def closed(orders: Orders, calls: Open) -> Orders:
    """Adds the orders in which open writes have happened by now."""
    found = set(orders)
    todo = list(orders)
    while todo:
        order = todo.pop()
        for client, value, again in calls:
            if order.done >> client & 1 and not again:
                continue
            after = Order(value, order.done | 1 << client)
            if after not in found:
                found.add(after)
                todo.append(after)
    return frozenset(found)


def read(orders: Orders, value: int) -> Orders:
    """Those in which a read just now has this result."""
    return frozenset(order for order in orders if order.value == value)


def written(orders: Orders, client: int) -> Orders:
    """Those in which the client's write has happened, which is answered now."""
    bit = 1 << client
    return frozenset(Order(order.value, order.done & ~bit) for order in orders if order.done & bit)
