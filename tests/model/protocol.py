"""The two-copies protocol (docs/internals/protocol.md) as a state machine small enough to be searched whole.

One chunk of one block, two or three SDSs, the MDM, two clients. A state is a tuple; ``successors`` yields every state that one
step of anybody can lead to. Time is only this: a lease lapses at some step, and who waits one out goes on when it has
lapsed. A frozen process is one that takes no steps while its lease lapses. Messages may be delayed for ever, overtake
those of other connections, and die with their connection. ``wrong`` names mistakes to build in, for the search to find.

Clients' calls are judged by ``Register``: the state holds every order of the calls so far that a single register
could have carried out, and the search has found an error when there is none left.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

T = TypeVar("T")

NONE = -1
WRITE, READ = "write", "read"
ANSWERS = ("written", "read done")


class Map(NamedTuple):
    """What the MDM has made durable for the chunk."""

    epoch: int
    primary: int
    secondary: int
    learner: int


class Pending(NamedTuple):
    """The write that the primary works on: the block's range lock allows one."""

    client: int
    call: int
    value: int
    tag: tuple[int, int]
    waits: tuple[int, ...]  # members that have not confirmed
    applied: bool


class Sds(NamedTuple):
    up: bool
    view: Map | None  # None: the MDM has not spoken to this process yet
    grants: bool  # renews the lease of its peer
    leased: bool  # holds a lease from its peer
    tag: tuple[int, int]
    value: int
    pending: Pending | None
    sessions: tuple[int, ...]  # per client: the newest that was seen
    links: tuple[int, ...]  # per SDS: the newest connection that it has opened to us
    link: int  # serial of our connection to the secondary
    done: tuple[int, ...]  # per client: the newest call that was applied
    copied: bool  # as primary: the learner has all that we have
    agreed: bool  # since this process began, or the connection: the pair's copies were compared


class Message(NamedTuple):
    kind: str
    source: int
    target: int
    session: int  # of the connection
    epoch: int
    client: int
    call: int
    value: int
    tag: tuple[int, int]


class Client(NamedTuple):
    call: int  # index in its program of the call under way or next
    open: bool
    session: int
    sends: int


class State(NamedTuple):
    map: Map
    promoting: int  # the MDM asks this secondary to take over
    servers: tuple[Sds, ...]
    clients: tuple[Client, ...]
    messages: frozenset[Message]
    orders: frozenset["Order"]
    crashes: int
    lapses: int


class Order(NamedTuple):
    """One way in which a register could have carried out the calls so far."""

    value: int
    done: tuple[int, ...]  # per client: NONE when its open call has not happened yet, else its result


@dataclass(frozen=True)
class Bounds:
    servers: int = 2
    programs: tuple[tuple[str, ...], ...] = ((WRITE, WRITE), (READ, READ))
    epochs: int = 3
    crashes: int = 1
    lapses: int = 2
    sends: int = 2


def value_of(client: int, call: int) -> int:
    return 10 * (client + 1) + call


class Protocol:
    """The rules. ``wrong`` is one of ``VARIANTS`` or empty."""

    def __init__(self, bounds: Bounds, wrong: str = "") -> None:
        assert wrong == "" or wrong in VARIANTS
        self.bounds = bounds
        self.wrong = wrong

    def start(self) -> State:
        first = Map(1, 0, 1, NONE)
        count = len(self.bounds.programs)
        fresh = Sds(
            True, first, True, True, (0, 0), 0, None, (0,) * count, (0,) * self.bounds.servers, 0, (NONE,) * count, False, True
        )
        spare = fresh._replace(leased=False)
        servers = (fresh, fresh) + (spare,) * (self.bounds.servers - 2)
        orders = frozenset({Order(0, (NONE,) * count)})
        return State(first, NONE, servers, (Client(0, False, 0, 0),) * count, frozenset(), orders, 0, 0)

    def successors(self, s: State) -> Iterator[tuple[str, State]]:
        yield from self._clients(s)
        for message in s.messages:
            after = self._deliver(s, message)
            if after is not None:
                yield f"{message.kind} {message.source}>{message.target}", after
        for i, server in enumerate(s.servers):
            if server.up:
                yield from self._server(s, i, server)
        yield from self._mdm(s)
        yield from self._faults(s)

    # -- clients

    def _clients(self, s: State) -> Iterator[tuple[str, State]]:
        for c, client in enumerate(s.clients):
            program = self.bounds.programs[c]
            if client.call == len(program) or client.sends == self.bounds.sends:
                continue
            kind = program[client.call]
            begun = s
            targets = self._targets(s, kind, client)
            for target in targets:
                session = client.session + (1 if client.open else 0)  # sent again: on a new connection
                message = Message(kind, c, target, session, s.map.epoch, c, client.call, value_of(c, client.call), (0, 0))
                sent = client._replace(open=True, session=session, sends=client.sends + 1)
                yield f"client {c} {kind}s at {target}", begun._replace(
                    clients=put(begun.clients, c, sent), messages=begun.messages | {message}
                )
            if kind == WRITE and self.wrong == "client fan-out" and not client.open:
                members = [m for m in s.map[1:3] if m != NONE]
                messages = {
                    Message("scatter", c, m, client.session, s.map.epoch, c, client.call, value_of(c, client.call), (0, 0))
                    for m in members
                }
                sent = client._replace(open=True, sends=self.bounds.sends)
                yield f"client {c} writes at all", begun._replace(
                    clients=put(begun.clients, c, sent), messages=begun.messages | messages
                )

    def _targets(self, s: State, kind: str, client: Client) -> list[int]:
        if kind == WRITE:
            return [] if self.wrong == "client fan-out" else [s.map.primary]
        return [member for member in s.map[1:3] if member != NONE]

    # -- messages

    def _deliver(self, s: State, m: Message) -> State | None:
        gone = s._replace(messages=s.messages - {m})
        if m.kind in ANSWERS:
            client = s.clients[m.target]
            if client.call != m.call or not client.open:
                return gone
            done = client._replace(call=client.call + 1, open=False, sends=0)
            return gone._replace(
                clients=put(s.clients, m.target, done), orders=answered(closure(s, self.bounds.programs), m.target, m.kind == "written", m.value)
            )
        server = s.servers[m.target]
        if not server.up:
            return gone
        if m.kind in (WRITE, READ, "scatter"):
            return self._request(gone, m, server)
        if m.kind == "replicate":
            return self._replicate(gone, m, server)
        return self._confirmed(gone, m, server)

    def _request(self, s: State, m: Message, server: Sds) -> State | None:
        if m.session < server.sessions[m.client] and self.wrong != "session not fenced":
            return s
        server = server._replace(sessions=put(server.sessions, m.client, max(m.session, server.sessions[m.client])))
        seen = s._replace(servers=put(s.servers, m.target, server))
        if not self._serves(server, m.target) or server.view is None or server.view.epoch != m.epoch:
            return seen
        if m.kind == READ:
            if server.pending is not None:
                return None  # held: it is delivered when the write has ended
            return send(seen, Message("read done", m.target, m.client, 0, 0, m.client, m.call, server.value, (0, 0)))
        if m.kind == "scatter":
            return self._scattered(seen, m, server)
        if server.view.primary != m.target:
            return seen
        if server.pending is not None and self.wrong != "sent again, answered early":
            return None  # behind the write under way, which may be this very one
        if m.call == server.done[m.client] and self.wrong != "operation ids forgotten":
            return send(seen, Message("written", m.target, m.client, 0, 0, m.client, m.call, 0, (0, 0)))
        if server.pending is not None:
            return None
        return self._begin_write(seen, m, server, server.view)

    def _scattered(self, s: State, m: Message, server: Sds) -> State:
        """Wrong: the client writes all copies itself, and takes the last answer for all."""
        tag = (server.tag[0], server.tag[1] + 1)
        s = s._replace(servers=put(s.servers, m.target, server._replace(tag=tag, value=m.value)))
        if any(other.kind == "scatter" and other.client == m.client and other.call == m.call for other in s.messages):
            return s
        return send(s, Message("written", m.target, m.client, 0, 0, m.client, m.call, 0, (0, 0)))

    def _begin_write(self, s: State, m: Message, server: Sds, view: Map) -> State:
        tag = (view.epoch, server.tag[1] + 1)
        waits = tuple(member for member in (view.secondary, view.learner) if member != NONE)
        first = self.wrong == "secondary first" and view.secondary != NONE
        pending = Pending(m.client, m.call, m.value, tag, waits, not first)
        server = server._replace(pending=pending)
        if not first:
            server = server._replace(tag=tag, value=m.value, done=put(server.done, m.client, m.call))
        s = s._replace(servers=put(s.servers, m.target, server))
        for member in waits:
            s = send(s, Message("replicate", m.target, member, server.link, view.epoch, m.client, m.call, m.value, tag))
        return self._settle(s, m.target)

    def _replicate(self, s: State, m: Message, server: Sds) -> State:
        if m.session < server.links[m.source] and self.wrong != "session not fenced":
            return s
        server = server._replace(links=put(server.links, m.source, max(m.session, server.links[m.source])))
        seen = s._replace(servers=put(s.servers, m.target, server))
        view = server.view
        if view is None or view.epoch != m.epoch or view.primary != m.source or m.target not in (view.secondary, view.learner):
            return seen
        if s.promoting == m.target and not server.grants:
            return seen  # asked to take over: the old epoch is refused
        if m.tag > server.tag:
            server = server._replace(tag=m.tag, value=m.value)
        server = server._replace(done=put(server.done, m.client, m.call))
        seen = s._replace(servers=put(s.servers, m.target, server))
        return send(seen, m._replace(kind="confirm", source=m.target, target=m.source))

    def _confirmed(self, s: State, m: Message, server: Sds) -> State:
        pending = server.pending
        if pending is None or pending.tag != m.tag or server.view is None or server.view.epoch != m.epoch:
            return s
        pending = pending._replace(waits=tuple(w for w in pending.waits if w != m.source))
        if not pending.applied:
            server = server._replace(tag=pending.tag, value=pending.value, done=put(server.done, m.client, m.call))
            pending = pending._replace(applied=True)
        s = s._replace(servers=put(s.servers, m.target, server._replace(pending=pending)))
        return self._settle(s, m.target)

    def _settle(self, s: State, i: int) -> State:
        """Answers the primary's write when nobody has to confirm any more."""
        server = s.servers[i]
        pending = server.pending
        if pending is None or pending.waits or not self._serves(server, i):
            return s
        s = s._replace(servers=put(s.servers, i, server._replace(pending=None)))
        return send(s, Message("written", i, pending.client, 0, 0, pending.client, pending.call, 0, (0, 0)))

    def _serves(self, server: Sds, i: int) -> bool:
        view = server.view
        if view is None or i not in (view.primary, view.secondary):
            return False
        return server.leased or view.secondary == NONE

    # -- servers

    def _server(self, s: State, i: int, server: Sds) -> Iterator[tuple[str, State]]:
        view = server.view
        if view != s.map and self._may_learn(s, i, server):
            yield f"{i} learns epoch {s.map.epoch}", self._learn(s, i, server)
        if view is None:
            return
        if view.primary == i and view.secondary != NONE:
            yield from self._pair(s, i, server, view)
        if view.primary == i and view.learner != NONE:
            yield from self._copy(s, i, server, view)
        if s.promoting == i and view == s.map and view.secondary == i:
            if server.grants:
                yield f"{i} refuses its primary", s._replace(servers=put(s.servers, i, server._replace(grants=False, leased=False)))
            elif self._lapsed(s, view.primary):
                taken = Map(view.epoch + 1, i, NONE, NONE)
                yield f"{i} takes over", s._replace(map=taken, promoting=NONE)

    def _lapsed(self, s: State, member: int) -> bool:
        """Whoever granted a lease has waited until it must have lapsed, also for a member that is frozen."""
        return self.wrong == "no lease wait" or not s.servers[member].up or not s.servers[member].leased

    def _pair(self, s: State, i: int, server: Sds, view: Map) -> Iterator[tuple[str, State]]:
        other = s.servers[view.secondary]
        together = other.up and other.view == view and server.grants and other.grants
        agreed = server.agreed and other.agreed
        if together and not agreed:
            yield f"{i} and {view.secondary} agree", self._agree(s, i, view.secondary)
        if together and (agreed or self.wrong == "no agreement") and not (server.leased and other.leased):
            both = put(put(s.servers, i, server._replace(leased=True)), view.secondary, other._replace(leased=True))
            yield f"{i} and {view.secondary} renew", self._settle(s._replace(servers=both), i)
        if server.grants:
            yield f"{i} gives {view.secondary} up", s._replace(servers=put(s.servers, i, server._replace(grants=False)))
        elif s.map == view and view.epoch < self.bounds.epochs:
            shrunk = Map(view.epoch + 1, i, NONE, NONE)
            yield f"{i} has the set shrunk", s._replace(map=shrunk, promoting=NONE)
        if not server.grants and self.wrong == "acknowledged before the shrink" and server.pending is not None:
            early = server._replace(pending=server.pending._replace(waits=()))
            yield f"{i} goes on alone", self._settle(s._replace(servers=put(s.servers, i, early)), i)

    def _agree(self, s: State, i: int, j: int) -> State:
        """The newer write wins on both sides, and what waited for the other side is settled by that."""
        server, other = s.servers[i], s.servers[j]
        newer = max(server, other, key=lambda sds: sds.tag)
        done = tuple(max(calls) for calls in zip(server.done, other.done, strict=True))
        pending = None if server.pending is None else server.pending._replace(waits=())
        same = {"tag": newer.tag, "value": newer.value, "agreed": True, "done": done}
        server = server._replace(**same, pending=pending, link=server.link + 1)
        other = other._replace(**same, links=put(other.links, i, server.link))
        return self._settle(s._replace(servers=put(put(s.servers, i, server), j, other)), i)

    def _may_learn(self, s: State, i: int, server: Sds) -> bool:
        """A new map is acted upon when the lease given to a member that it leaves out has lapsed."""
        if s.map.primary != i or server.view is None or server.view.secondary in (NONE, s.map.secondary):
            return True
        left_out = server.view.secondary if server.view.primary == i else server.view.primary
        return self._lapsed(s, left_out)

    def _learn(self, s: State, i: int, server: Sds) -> State:
        pending = server.pending
        if pending is not None:
            if s.map.primary != i:
                pending = None  # the client sends it again, to the new primary
            else:
                waits = tuple(w for w in pending.waits if w in (s.map.secondary, s.map.learner))
                if not pending.applied:
                    pending = None if self.wrong == "secondary first" else pending._replace(applied=True)
                pending = None if pending is None else pending._replace(waits=waits)
        joined = server.view is not None and s.map.primary == i and server.view.learner == s.map.secondary != NONE
        was_learner = server.view is not None and server.view.learner == i == s.map.secondary
        server = server._replace(view=s.map, grants=True, leased=False, pending=pending, copied=False)
        if s.map.secondary == NONE or joined or was_learner:
            server = server._replace(agreed=True)  # alone, or a copy that has all
        if not joined:
            server = server._replace(link=server.link + 1 if s.map.primary == i else server.link)
        return self._settle(s._replace(servers=put(s.servers, i, server)), i)

    def _copy(self, s: State, i: int, server: Sds, view: Map) -> Iterator[tuple[str, State]]:
        learner = s.servers[view.learner]
        if learner.up and learner.view == view and server.pending is None and not server.copied:
            same = learner._replace(tag=server.tag, value=server.value, done=server.done)
            both = put(put(s.servers, view.learner, same), i, server._replace(copied=True))
            yield f"{i} copies to {view.learner}", s._replace(servers=both)
        enough = server.copied or self.wrong == "learner counted early"
        if enough and s.map == view and view.epoch < self.bounds.epochs and learner.up and learner.view == view:
            yield f"{view.learner} joins", s._replace(map=Map(view.epoch + 1, i, view.learner, NONE))

    # -- the MDM

    def _mdm(self, s: State) -> Iterator[tuple[str, State]]:
        if s.map.epoch >= self.bounds.epochs:
            return
        if s.promoting == NONE and s.map.secondary != NONE:
            yield "the MDM gives the primary up", s._replace(promoting=s.map.secondary)
        if s.map.secondary == NONE and s.map.learner == NONE:
            for i, server in enumerate(s.servers):
                if server.up and i != s.map.primary:
                    yield f"{i} is to learn", s._replace(map=s.map._replace(epoch=s.map.epoch + 1, learner=i))
                if server.up and i != s.map.primary and self.wrong == "stale copy promoted" and not s.servers[s.map.primary].up:
                    yield f"{i} is promoted", s._replace(map=Map(s.map.epoch + 1, i, NONE, NONE))

    # -- faults

    def _faults(self, s: State) -> Iterator[tuple[str, State]]:
        for i, server in enumerate(s.servers):
            if server.up and server.leased and s.lapses < self.bounds.lapses:
                lapsed = server._replace(leased=False)
                yield f"the lease of {i} lapses", s._replace(servers=put(s.servers, i, lapsed), lapses=s.lapses + 1)
            if server.up and s.crashes < self.bounds.crashes:
                count = len(self.bounds.programs)
                dead = server._replace(
                    up=False, view=None, grants=True, leased=False, pending=None, sessions=(0,) * count,
                    links=(0,) * len(s.servers), done=(NONE,) * count, copied=False,
                    agreed=False,
                )  # fmt: skip
                left = frozenset(m for m in s.messages if m.target != i or m.kind in ANSWERS)
                yield (
                    f"{i} dies",
                    s._replace(servers=put(s.servers, i, dead), crashes=s.crashes + 1, messages=left),
                )
            if not server.up:
                yield f"{i} returns", s._replace(servers=put(s.servers, i, server._replace(up=True)))


VARIANTS = (
    "acknowledged before the shrink",
    "no lease wait",
    "stale copy promoted",
    "client fan-out",
    "session not fenced",
    "operation ids forgotten",
    "secondary first",
    "learner counted early",
    "no agreement",
    "sent again, answered early",
)


def put(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return (*items[:index], item, *items[index + 1 :])


def send(s: State, message: Message) -> State:
    return s._replace(messages=s.messages | {message})


# -- the register that the clients must not be able to tell from two copies

def closure(s: State, programs: tuple[tuple[str, ...], ...]) -> frozenset[Order]:
    """Every order after any of the open calls may have happened."""
    found = set(s.orders)
    todo = list(found)
    while todo:
        order = todo.pop()
        for c, client in enumerate(s.clients):
            if not client.open or order.done[c] != NONE:
                continue
            if programs[c][client.call] == WRITE:
                value = value_of(c, client.call)
                after = Order(value, put(order.done, c, value))
            else:
                after = Order(order.value, put(order.done, c, order.value))
            if after not in found:
                found.add(after)
                todo.append(after)
    return frozenset(found)


def answered(orders: frozenset[Order], client: int, write: bool, value: int) -> frozenset[Order]:
    """Those in which the call has happened, with that result."""
    return frozenset(
        Order(order.value, put(order.done, client, NONE))
        for order in orders
        if order.done[client] != NONE and (write or order.done[client] == value)
    )
