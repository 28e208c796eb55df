"""How far the protocol is searched: what a test run affords, more for ``make model``, and where each mistake shows."""

from tests.model.protocol import Bounds

# Both sets are searched whole: a right protocol has no error in any state of them.
QUICK: dict[str, Bounds] = {
    "one client writes twice, sent again": Bounds(writes=(2,), epochs=3),
    "two clients, sent again": Bounds(writes=(1, 1), epochs=2),
    "two clients, out and back in the set": Bounds(writes=(1, 1), epochs=4, sends=1),
    "three writes of two clients": Bounds(writes=(2, 1), epochs=3, sends=1),
    "two restarts, out and back in the set": Bounds(writes=(1,), epochs=4, crashes=2),
    "three servers": Bounds(servers=3, writes=(1,), epochs=4),
}
# With an operator in it: acknowledged writes may be lost, and are never seen again.
FORCED: dict[str, Bounds] = {
    "one client, an older copy is forced": Bounds(writes=(2,), epochs=4, crashes=1, forced=True),
}
LARGE: dict[str, Bounds] = {
    "one client writes twice, two restarts": Bounds(writes=(2,), epochs=3, crashes=2),
    "two clients, two restarts, sent again": Bounds(writes=(1, 1), epochs=2, crashes=2),
    "two clients, two restarts, back in the set": Bounds(writes=(1, 1), epochs=4, crashes=2, sends=1),
    "two clients, three epochs, sent again": Bounds(writes=(1, 1), epochs=3),
    "three servers, two clients": Bounds(servers=3, writes=(1, 1), epochs=4, sends=1),
    "three servers, two restarts": Bounds(servers=3, writes=(1,), epochs=4, crashes=2, sends=1),
    "three writes of two clients, back in the set": Bounds(writes=(2, 1), epochs=4, sends=1),
}

TWICE = QUICK["one client writes twice, sent again"]
CLIENTS = QUICK["two clients, sent again"]
BACK = QUICK["two clients, out and back in the set"]

# Each mistake with bounds in which it shows.
SHOWS: dict[str, Bounds] = {
    "acknowledged before the shrink": TWICE,
    "no lease wait": TWICE,
    "no lease wait after a restart": TWICE,
    "stale copy promoted": TWICE,
    "client fan-out": CLIENTS,
    "session not fenced": TWICE,
    "operation ids forgotten": CLIENTS,
    "sent again, answered early": TWICE,
    "answer of an older connection taken": CLIENTS,
    "secondary first": TWICE,
    "learner counted early": BACK,
    "no agreement": TWICE,
    "newer copy wins against a survivor": CLIENTS,
    "restarted primary shrinks": TWICE,
    "restarted secondary promoted": CLIENTS,
    "shrink before the own copy is written": TWICE,
    "writes begun while it asks to be alone": TWICE,
    "sequence used again": BACK,
}

STATES_MAX = 3_000_000
