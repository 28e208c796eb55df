"""The two-copies protocol (docs/internals/protocol.md) as a state machine small enough to be searched whole.

One block, two or three SDSs, the MDM, clients that write; anybody may read at any instant. ``successors`` yields
every state that one step of anybody can lead to. What never happens is a step that is not taken: a lost message, a
frozen process, an MDM that is away. A read is an instant at whoever serves, a call begins when its first message is
sent and ends when its answer is: longer calls only allow more. Where one side waits for another's lease to lapse, the
step after the wait takes the lease away: an earlier lapse only forbids things. A restart is one step, because a dead
process takes none.

``wrong`` names a mistake to build in, for the search to find.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from tests.model import register
from tests.model.register import Orders

T = TypeVar("T")
Tag = tuple[int, int, int]  # epoch, incarnation of the primary, count

NONE = -1
WRITE, REPLICATE, CONFIRM = "write", "replicate", "confirm"

VARIANTS = (
    "acknowledged before the shrink",
    "no lease wait",
    "no lease wait after a restart",
    "stale copy promoted",
    "client fan-out",
    "session not fenced",
    "operation ids forgotten",
    "sent again, answered early",
    "answer of an older connection taken",
    "secondary first",
    "learner counted early",
    "no agreement",
    "newer copy wins against a survivor",
    "restarted primary shrinks",
    "restarted secondary promoted",
    "shrink before the own copy is written",
    "writes begun while it asks to be alone",
    "sequence used again",
)


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
    tag: Tag
    waits: tuple[int, ...]  # members that have not confirmed
    applied: bool
    before: tuple[Tag, int]  # what a crash may leave on the disk instead
    heard: bool  # the connection that it came by is the client's newest


class Sds(NamedTuple):
    view: Map | None  # None: the MDM has not spoken to this process yet
    leased: bool  # holds a lease from its peer
    tag: Tag
    value: int
    pending: Pending | None
    done: tuple[int, ...]  # per client: the newest call that was applied
    copied: bool  # as primary: the learner has all that we have
    agreed: bool  # has been in the set since it knew everything, or has compared copies
    starts: int  # incarnation


class Message(NamedTuple):
    kind: str
    source: int  # SDS, or client of a WRITE
    target: int
    session: int  # of the client's connection
    epoch: int
    client: int
    call: int
    value: int
    tag: Tag


class Client(NamedTuple):
    call: int  # number of the call under way or next
    open: bool
    session: int
    sends: int
    answered: bool  # the answer is on its way, by the newest connection
    again: bool  # nobody alive knows of the open call: sent again, it may be carried out again


class State(NamedTuple):
    map: Map
    servers: tuple[Sds, ...]
    clients: tuple[Client, ...]
    messages: frozenset[Message]
    orders: Orders
    crashes: int


@dataclass(frozen=True)
class Bounds:
    servers: int = 2
    writes: tuple[int, ...] = (1, 1)  # per client
    epochs: int = 3
    crashes: int = 1
    sends: int = 2  # of one write
    forced: bool = False  # an operator has a learner serve what its primary, which is dead, may have newer


Steps = Iterator[tuple[str, State]]


class Protocol:
    """The rules. ``wrong`` is one of ``VARIANTS`` or empty."""

    def __init__(self, bounds: Bounds, wrong: str = "") -> None:
        assert wrong == "" or wrong in VARIANTS
        self.bounds = bounds
        self.wrong = wrong

    def start(self) -> State:
        first = Map(1, 0, 1, NONE)
        nothing = (NONE,) * len(self.bounds.writes)
        member = Sds(first, True, (0, 0, 0), 0, None, nothing, False, True, 0)
        spare = member._replace(leased=False, agreed=False)
        servers = (member, member) + (spare,) * (self.bounds.servers - 2)
        clients = (Client(0, False, 0, 0, False, False),) * len(self.bounds.writes)
        return State(first, servers, clients, frozenset(), register.FRESH, 0)

    def successors(self, s: State) -> Steps:
        for step, after in self._steps(s):
            yield step, self._seen(self._tidy(after))

    def error(self, s: State) -> str:
        if not s.orders:
            return "no register could have answered so"
        copies = {(server.tag, server.value) for server in s.servers}
        return "" if len(copies) == len({tag for tag, _ in copies}) else "equal tags, different bytes"

    def shown(self, s: State) -> dict[int, int]:
        """What whom answers to a read: a primary holds reads of what is under way."""
        return {i: v.value for i, v in enumerate(s.servers) if v.pending is None and self._serves(v, i)}

    def _seen(self, s: State) -> State:
        """Everybody who serves is read from, over and over: an error is only found sooner for it."""
        while True:
            before = s.orders
            for value in self.shown(s).values():
                orders = register.read(s.orders, value)
                if orders != s.orders:
                    s = self._opened(s._replace(orders=orders))
            if s.orders == before or not s.orders:
                return s

    def _steps(self, s: State) -> Steps:
        for c, client in enumerate(s.clients):
            if client.answered:
                yield f"client {c} has its answer", self._finish(s, c)
                if self.wrong != "answer of an older connection taken":
                    lost = client._replace(answered=False)
                    yield f"client {c} loses its answer", s._replace(clients=put(s.clients, c, lost))
                    return  # an answer that comes later only forbids less
        for c, client in enumerate(s.clients):
            yield from self._client(s, c, client)
        for message in s.messages:
            after = self._deliver(s, message)
            if after is not None:
                yield f"{message.kind} {message.value} from {message.source} arrives at {message.target}", after
        for i, server in enumerate(s.servers):
            yield from self._server(s, i, server)
        yield from self._mdm(s)

    # -- clients

    def _client(self, s: State, c: int, client: Client) -> Steps:
        if client.call == self.bounds.writes[c] or client.sends == self.bounds.sends:
            return
        if self.wrong == "client fan-out":
            if not client.open:
                yield f"client {c} writes {value_of(c, client.call)} at both", self._scatter(s, c, client)
            return
        session = client.session + client.open  # sent again: on a new connection
        sent = client._replace(open=True, session=session, sends=client.sends + 1)
        begun = self._opened(s._replace(clients=put(s.clients, c, sent), servers=self._unheard(s, c)))
        what = f"client {c} {'re' * client.open}sends write {value_of(c, client.call)}"
        for i, epoch in self._primaries(s):
            message = Message(WRITE, c, i, session, epoch, c, client.call, value_of(c, client.call), (0, 0, 0))
            after = self._request(begun, message, s.servers[i])
            if after is not None:
                yield f"{what} to {i}", after
            if client.open or sent.sends < self.bounds.sends:
                yield f"{what} to {i}, slowly", begun._replace(messages=begun.messages | {message})

    def _primaries(self, s: State) -> set[tuple[int, int]]:
        """A client may have any map: whoever takes itself for the primary may be asked."""
        asked = {(i, v.view.epoch) for i, v in enumerate(s.servers) if v.view is not None and v.view.primary == i}
        return asked | {(s.map.primary, s.map.epoch)}

    def _unheard(self, s: State, c: int) -> tuple[Sds, ...]:
        """Answers to what the client has sent before go to a connection that it has closed."""
        if self.wrong == "answer of an older connection taken":
            return s.servers
        return tuple(
            v._replace(pending=v.pending._replace(heard=False))
            if v.pending is not None and v.pending.client == c
            else v
            for v in s.servers
        )

    def _opened(self, s: State) -> State:
        calls = tuple((c, value_of(c, k.call), k.again) for c, k in enumerate(s.clients) if k.open)
        return s._replace(orders=register.closed(s.orders, calls))

    def _answer(self, s: State, c: int, call: int) -> State:
        client = s.clients[c]
        if client.call != call or not client.open or client.answered:
            return s
        s = s._replace(clients=put(s.clients, c, client._replace(answered=True)))
        return s if client.sends < self.bounds.sends else self._finish(s, c)

    def _finish(self, s: State, c: int) -> State:
        client = s.clients[c]
        after = client._replace(call=client.call + 1, open=False, sends=0, answered=False, again=False)
        orders = register.written(s.orders, c)
        return self._opened(s._replace(clients=put(s.clients, c, after), orders=orders))

    def _scatter(self, s: State, c: int, client: Client) -> State:
        """Wrong: the client writes all copies itself, and takes the last answer for all."""
        sent = client._replace(open=True, sends=self.bounds.sends)
        value = value_of(c, client.call)
        messages = {Message(WRITE, c, m, 0, s.map.epoch, c, client.call, value, (0, 0, value)) for m in s.map[1:3]}
        return self._opened(s._replace(clients=put(s.clients, c, sent), messages=s.messages | messages))

    # -- messages

    def _deliver(self, s: State, m: Message) -> State | None:
        """None: it has no effect, now or ever. Those that never will have are dropped by ``_tidy``."""
        server = s.servers[m.target]
        if m.kind == WRITE:
            return self._request(s, m, server)
        s = s._replace(messages=s.messages - {m})
        view = server.view
        if view is None or view.epoch != m.epoch:
            return None
        return self._replicate(s, m, server) if m.kind == REPLICATE else self._confirmed(s, m, server)

    def _request(self, s: State, m: Message, server: Sds) -> State | None:
        view = server.view
        if view is None or view.epoch != m.epoch or not self._serves(server, m.target):
            return None
        s = s._replace(messages=s.messages - {m})
        if self.wrong == "client fan-out":
            return self._scattered(s, m, server)
        if view.primary != m.target:
            return None
        older = {o for o in s.messages if o.kind == WRITE and o.source == m.source and o.target == m.target}
        if any(o.session == m.session and o.call < m.call for o in older):
            return None  # one connection keeps its order
        if self.wrong != "session not fenced":
            s = s._replace(messages=s.messages - {o for o in older if o.session < m.session})
        if server.pending is not None and self.wrong != "sent again, answered early":
            return None  # behind the write under way, which may be this very one
        heard = m.session == s.clients[m.client].session
        if m.call == server.done[m.client] and self.wrong != "operation ids forgotten":
            return self._answer(s, m.client, m.call) if heard else s
        asking = view.secondary not in (NONE, s.map.secondary) and s.map.primary == m.target
        if server.pending is not None or (asking and self.wrong != "writes begun while it asks to be alone"):
            return None
        return self._begin_write(s, m, server, view, heard)

    def _scattered(self, s: State, m: Message, server: Sds) -> State:
        s = s._replace(servers=put(s.servers, m.target, server._replace(tag=m.tag, value=m.value)))
        if any(o.client == m.client and o.call == m.call for o in s.messages):
            return s
        return self._answer(s, m.client, m.call)

    def _begin_write(self, s: State, m: Message, server: Sds, view: Map, heard: bool) -> State:
        heard = heard or self.wrong == "answer of an older connection taken"
        starts = 0 if self.wrong == "sequence used again" else server.starts
        tag = (view.epoch, starts, server.tag[2] + 1 if server.tag[:2] == (view.epoch, starts) else 1)
        waits = tuple(member for member in view[2:4] if member != NONE)
        first = self.wrong == "secondary first" and view.secondary != NONE
        pending = Pending(m.client, m.call, m.value, tag, waits, not first, (server.tag, server.value), heard)
        server = server._replace(pending=pending)
        if not first:
            server = server._replace(tag=tag, value=m.value, done=put(server.done, m.client, m.call))
        return self._settle(self._forward(s._replace(servers=put(s.servers, m.target, server)), m.target), m.target)

    def _forward(self, s: State, i: int) -> State:
        """Sends the primary's write to all that have not confirmed it."""
        server = s.servers[i]
        p, view = server.pending, server.view
        if p is None or view is None or not p.waits:
            return s
        sent = {Message(REPLICATE, i, j, 0, view.epoch, p.client, p.call, p.value, p.tag) for j in p.waits}
        return s._replace(messages=s.messages | sent)

    def _replicate(self, s: State, m: Message, server: Sds) -> State | None:
        if server.view is None or server.view.primary != m.source or m.target not in server.view[2:4]:
            return None
        if m.tag > server.tag:
            server = server._replace(tag=m.tag, value=m.value)
        server = server._replace(done=put(server.done, m.client, max(m.call, server.done[m.client])))
        confirm = m._replace(kind=CONFIRM, source=m.target, target=m.source)
        return s._replace(servers=put(s.servers, m.target, server), messages=s.messages | {confirm})

    def _confirmed(self, s: State, m: Message, server: Sds) -> State | None:
        pending = server.pending
        if pending is None or pending.tag != m.tag:
            return None
        if not pending.applied:
            done = put(server.done, m.client, m.call)
            server = server._replace(tag=pending.tag, value=pending.value, done=done)
        pending = pending._replace(waits=tuple(w for w in pending.waits if w != m.source), applied=True)
        return self._settle(s._replace(servers=put(s.servers, m.target, server._replace(pending=pending))), m.target)

    def _settle(self, s: State, i: int) -> State:
        """Answers the primary's write when nobody has to confirm any more."""
        server = s.servers[i]
        pending = server.pending
        if pending is None or pending.waits or not self._serves(server, i):
            return s
        s = s._replace(servers=put(s.servers, i, server._replace(pending=None)))
        return self._answer(s, pending.client, pending.call) if pending.heard else s

    def _serves(self, server: Sds, i: int) -> bool:
        view = server.view
        return view is not None and i in view[1:3] and (server.leased or view.secondary == NONE)

    # -- servers

    def _server(self, s: State, i: int, server: Sds) -> Steps:
        view = server.view
        if s.crashes < self.bounds.crashes and view is not None:
            yield from self._restarts(s, i, server)
        if view != s.map:
            yield f"{i} learns {s.map}", self._learn(s, i, server)
        if view is None:
            return
        if view.primary == i and view.secondary != NONE:
            yield from self._pair(s, i, server, view)
        if view.primary == i and view.learner != NONE:
            yield from self._copy(s, i, server, view)
        may = server.agreed or self.wrong == "restarted secondary promoted"
        if may and view.secondary == i and view == s.map and view.epoch < self.bounds.epochs:
            # It has refused the old epoch, and has waited until the primary's lease must have lapsed.
            taken = self._lapse(s, {view.primary}) if self.wrong != "no lease wait" else s
            taken = taken._replace(map=Map(view.epoch + 1, i, NONE, NONE))
            yield f"{i} takes over", self._learn(taken, i, server)

    def _lapse(self, s: State, members: set[int]) -> State:
        return s._replace(
            servers=tuple(v._replace(leased=v.leased and i not in members) for i, v in enumerate(s.servers))
        )

    def _pair(self, s: State, i: int, server: Sds, view: Map) -> Steps:
        j = view.secondary
        other = s.servers[j]
        if other.view == view and not (server.agreed and other.agreed):
            yield f"{i} and {j} compare copies", self._agree(s, i, j)
        may = server.agreed or self.wrong == "restarted primary shrinks"
        if may and s.map == view and view.epoch < self.bounds.epochs:
            yield f"{i} has {j} taken out", self._shrink(s, i, server, view)
        if self.wrong == "acknowledged before the shrink" and server.pending is not None:
            alone = server._replace(pending=server.pending._replace(waits=()))
            yield f"{i} goes on alone", self._settle(s._replace(servers=put(s.servers, i, alone)), i)

    def _shrink(self, s: State, i: int, server: Sds, view: Map) -> State:
        """The other member may show the write under way: from here on, a crash must not lose it."""
        if server.pending is not None and self.wrong != "shrink before the own copy is written":
            server = server._replace(pending=server.pending._replace(before=(server.tag, server.value)))
        return s._replace(servers=put(s.servers, i, server), map=Map(view.epoch + 1, i, NONE, NONE))

    def _agree(self, s: State, i: int, j: int) -> State:
        """Whoever has not restarted has everything that anybody was shown, and knows the operations."""
        server, other = s.servers[i], s.servers[j]
        best = max(server, other, key=lambda sds: sds.tag)
        done = tuple(max(calls) for calls in zip(server.done, other.done, strict=True))
        if server.agreed != other.agreed and self.wrong != "newer copy wins against a survivor":
            best = server if server.agreed else other
            done = best.done
        pending = None if server.pending is None else server.pending._replace(waits=())
        server = copy_of(best, server)._replace(agreed=True, done=done, pending=pending)
        other = copy_of(best, other)._replace(agreed=True, done=done)
        s = s._replace(servers=put(put(s.servers, i, server), j, other))
        return self._lease(self._connected(s, i, j), i)

    def _connected(self, s: State, i: int, j: int) -> State:
        """A new connection: what was under way on the one before is refused."""
        if self.wrong == "session not fenced":
            return s
        return s._replace(
            messages=frozenset(m for m in s.messages if m.kind == WRITE or {m.source, m.target} != {i, j})
        )

    def _lease(self, s: State, i: int) -> State:
        """The two members of i's view serve from now on, if they have the same view and have agreed."""
        view = s.servers[i].view
        if view is None or view.secondary == NONE:
            return self._settle(s, i)
        pair = s.servers[view.primary], s.servers[view.secondary]
        if any(v.view != view or not (v.agreed or self.wrong == "no agreement") for v in pair):
            return s
        servers = put(s.servers, view.primary, pair[0]._replace(leased=True))
        servers = put(servers, view.secondary, pair[1]._replace(leased=True))
        return self._settle(s._replace(servers=servers), view.primary)

    def _learn(self, s: State, i: int, server: Sds) -> State:
        old, new = server.view, s.map
        leads, alone = new.primary == i, new.secondary == NONE
        if leads and self.wrong != "no lease wait":
            # A member left out may still serve; a process that restarted does not know whom it gave a lease.
            if old is None and self.wrong != "no lease wait after a restart":
                s = self._lapse(s, set(range(len(s.servers))) - set(new[1:3]))
            if old is not None:
                s = self._lapse(s, set(old[1:3]) - set(new[1:3]))
        whole = old is not None and old.learner == new.secondary != NONE and i in new[1:3]
        member = i in new[1:3]
        server = server._replace(
            view=new,
            leased=False,
            copied=False,
            agreed=(leads and alone) or whole,
            pending=self._carried(server.pending, new) if leads else None,  # else clients send it to the new primary
            done=server.done if member or i == new.learner else (NONE,) * len(server.done),
        )
        return self._lease(self._forward(s._replace(servers=put(s.servers, i, server)), i), i)

    def _carried(self, pending: Pending | None, new: Map) -> Pending | None:
        if pending is None or not pending.applied:
            return None
        return pending._replace(waits=tuple(w for w in pending.waits if w in new[2:4]))

    def _copy(self, s: State, i: int, server: Sds, view: Map) -> Steps:
        learner = s.servers[view.learner]
        if learner.view != view:
            return
        if server.pending is None and not server.copied:
            same = copy_of(server, learner)._replace(done=server.done)
            both = put(put(s.servers, view.learner, same), i, server._replace(copied=True))
            yield f"{i} copies to {view.learner}", self._connected(s._replace(servers=both), i, view.learner)
        enough = server.copied or self.wrong == "learner counted early"
        if enough and s.map == view and view.epoch < self.bounds.epochs:
            yield f"{view.learner} joins", s._replace(map=Map(view.epoch + 1, i, view.learner, NONE))

    def _restarts(self, s: State, i: int, server: Sds) -> Steps:
        nothing = (NONE,) * len(server.done)
        dead = server._replace(
            view=None, leased=False, pending=None, done=nothing, copied=False, agreed=False, starts=server.starts + 1
        )
        clients = s.clients
        members = [j for j in s.map[1:3] if j != NONE]
        if i in members and not any(s.servers[j].agreed for j in members if j != i):
            # The last that knew of operations is gone: what it, or a disk, has of open ones may be carried out again.
            left = {s.servers[j].value for j in members}
            clients = tuple(
                k._replace(again=k.again or (k.open and (server.done[c] == k.call or value_of(c, k.call) in left)))
                for c, k in enumerate(clients)
            )
        after = s._replace(
            clients=clients, crashes=s.crashes + 1, messages=frozenset(m for m in s.messages if m.target != i)
        )
        after = self._opened(after)
        yield f"{i} restarts", after._replace(servers=put(s.servers, i, dead))
        if server.pending is not None and server.pending.applied:
            tag, value = server.pending.before
            lost = dead._replace(tag=tag, value=value)
            yield f"{i} restarts, write {server.value} lost", after._replace(servers=put(s.servers, i, lost))

    # -- the MDM

    def _force(self, s: State) -> Steps:
        """What only the dead primary had is lost: from when the learner knows of it there is the register that it has,
        in which open writes have happened or not."""
        m = s.map
        if not self.bounds.forced or NONE in (m.primary, m.learner) or m.secondary != NONE:
            return
        if m.epoch >= self.bounds.epochs or s.servers[m.primary].view is not None:
            return
        value = s.servers[m.learner].value
        orders = frozenset(register.Order(value, done) for done in range(1 << len(s.clients)))
        forced = s._replace(map=Map(m.epoch + 1, m.learner, NONE, m.primary), orders=orders)
        yield f"{m.learner} is forced to serve", self._learn(self._opened(forced), m.learner, s.servers[m.learner])

    def _mdm(self, s: State) -> Steps:
        yield from self._force(s)
        if s.map.epoch >= self.bounds.epochs or s.map.secondary != NONE or s.map.learner != NONE:
            return
        for i in range(len(s.servers)):
            if i == s.map.primary:
                continue
            yield f"{i} is to learn", s._replace(map=s.map._replace(epoch=s.map.epoch + 1, learner=i))
            if self.wrong == "stale copy promoted" and s.servers[s.map.primary].view is None:
                yield f"{i} is promoted", s._replace(map=Map(s.map.epoch + 1, i, NONE, NONE))

    # -- states that differ in nothing that matters

    def _tidy(self, s: State) -> State:
        messages = frozenset(m for m in s.messages if self._matters(s, m))
        clients = s.clients
        for c, client in enumerate(clients):
            slow = {m for m in messages if m.kind == WRITE and m.source == c}
            if client.session == 0 and not slow:
                continue
            serials = sorted({m.session for m in slow} | {client.session})
            clients = put(clients, c, client._replace(session=serials.index(client.session)))
            messages = messages - slow | {m._replace(session=serials.index(m.session)) for m in slow}
        first = [k.call for k in clients]  # whose number anybody may still ask for
        for m in messages:
            first[m.client] = min(first[m.client], m.call)
        servers = s.servers
        for i, v in enumerate(servers):
            if any(NONE < d < call for d, call in zip(v.done, first, strict=True)):
                done = tuple(NONE if d < call else d for d, call in zip(v.done, first, strict=True))
                servers = put(servers, i, v._replace(done=done))
        return State(s.map, servers, clients, messages, s.orders, s.crashes)

    def _matters(self, s: State, m: Message) -> bool:
        """Whether it may still have an effect. An epoch never comes back, and neither does a role in it."""
        target = s.servers[m.target]
        view = target.view
        if view is None:
            return m.epoch >= s.map.epoch
        if view.epoch != m.epoch:
            return view.epoch < m.epoch
        if m.kind == WRITE:
            return view.primary == m.target or self.wrong == "client fan-out"
        if m.kind == CONFIRM:
            return target.pending is not None and target.pending.tag == m.tag and m.source in target.pending.waits
        if view.primary != m.source or m.target not in view[2:4]:
            return False
        waiting = s.servers[m.source].pending
        return m.tag > target.tag or (waiting is not None and waiting.tag == m.tag and m.target in waiting.waits)


def value_of(client: int, call: int) -> int:
    return 10 * (client + 1) + call


def copy_of(source: Sds, target: Sds) -> Sds:
    """Equal tags are taken for equal bytes, as a resync does."""
    return target if source.tag == target.tag else target._replace(tag=source.tag, value=source.value)


def put(items: tuple[T, ...], index: int, item: T) -> tuple[T, ...]:
    return (*items[:index], item, *items[index + 1 :])
