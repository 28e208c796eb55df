"""One authenticated connection of the control RPC, the same on both sides: calls, answers and notifications, both ways.

A ``Session`` owns the transport and every task on it; whoever made it runs ``run``, which ends when the connection
does. It promises: a call ends with its answer, or an error no later than its deadline; requests are handled
concurrently, at most IN_FLIGHT_MAX; notifications are handled one after the other, in the order sent; whatever the
other side sends, nothing is raised out of ``run``: the connection is closed and ``close_reason`` says why.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from pfvol.constants import HEARTBEAT_SECONDS, RPC_TIMEOUT_SECONDS, SDS_DOWN_AFTER_SECONDS
from pfvol.errors import ConflictError, Error, InternalError, ProtocolError, TimedOutError, UnreachableError
from pfvol.log import get_logger
from pfvol.rpc import codec
from pfvol.rpc.messages import Answer, Message, Notification, Params, Request, from_value, to_value
from pfvol.rpc.transport import Transport

IN_FLIGHT_MAX = 64
OUTBOX_MESSAGES_MAX = 256
NOTIFICATIONS_WAITING_MAX = 1024
WRITE_BATCH_BYTES = 64 * 1024
HANDLER_SECONDS_MAX = 120.0
PING = "rpc.ping"

assert HEARTBEAT_SECONDS * 2 < SDS_DOWN_AFTER_SECONDS

Handler = Callable[[str, Params], Awaitable[Any]]

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end, as it has proven and said: its role (mdm, sds, sdc), its name, where its packets come from."""

    role: str
    name: str
    address: str
    cluster_id: bytes | None

    def __str__(self) -> str:
        return f"{self.role} {self.name} at {self.address}" if self.name else f"{self.role} at {self.address}"


@dataclass(slots=True)
class Statistics:
    calls: int = 0
    calls_failed: int = 0
    requests: int = 0
    notifications: int = 0
    in_flight: int = 0
    handling: int = 0


@dataclass(slots=True)
class _Pending:
    done: trio.Event
    answer: Answer | None = None
    error: Error | None = None


class Session:
    """See the module. ``handler(method, params)`` gets what the other side asks and tells; its result is the answer."""

    def __init__(self, transport: Transport, peer: Peer, handler: Handler) -> None:
        self.peer = peer
        self.closed = trio.Event()
        self.close_reason = ""
        self.ended_by_peer = False
        """When closed: by the other end's process or kernel, as when it is killed."""
        self._transport = transport
        self._handler = handler
        self._scope = trio.CancelScope()
        self._pending: dict[int, _Pending] = {}
        self._last_id = 0
        self._slots = trio.Semaphore(IN_FLIGHT_MAX)
        self._outbox, self._to_send = trio.open_memory_channel[bytes](OUTBOX_MESSAGES_MAX)
        self._inbox, self._told = trio.open_memory_channel[Notification](NOTIFICATIONS_WAITING_MAX)
        self._sent_at = trio.current_time()
        self._statistics = Statistics()

    def statistics(self) -> Statistics:
        self._statistics.in_flight = len(self._pending)
        return self._statistics

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves the connection until it is closed, by either side or by cancelling this."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for task in (self._write, self._ping, self._tell):
                        nursery.start_soon(self._guarded, task)
                    nursery.start_soon(self._guarded, self._read, nursery)
                    task_status.started()
        finally:
            self.close("closed here")
            with trio.CancelScope(shield=True):
                await self._transport.close()

    def close(self, reason: str) -> None:
        """Ends the session: calls in flight fail now, everything else follows. The first reason stays."""
        if self.closed.is_set():
            return
        self.close_reason = reason
        self.closed.set()
        for pending in self._pending.values():
            pending.error = self._lost()
            pending.done.set()
        self._to_send.close()
        self._told.close()
        self._scope.cancel()

    async def call(  # The deadline belongs to the protocol: expired, it is a TimedOutError of ours.
        self,
        method: str,
        params: Params | None = None,
        *,
        timeout: float = RPC_TIMEOUT_SECONDS,  # noqa: ASYNC109
    ) -> Any:
        """What the other side answers. timeout in seconds, sending included.

        Raises the error that the other side raised, ``TimedOutError``, or ``UnreachableError`` when the connection is
        lost before the answer: then the request may have been carried out, or not.
        """
        self._statistics.calls += 1
        try:
            with trio.fail_after(timeout):
                async with self._slots:
                    return await self._call(method, params or {})
        except trio.TooSlowError:
            self._statistics.calls_failed += 1
            raise TimedOutError(f"{self.peer} did not answer {method} within {timeout:g} s") from None
        except Error:
            self._statistics.calls_failed += 1
            raise

    async def notify(self, method: str, params: Params | None = None) -> None:
        """Tells the other side, without an answer. Raises ``UnreachableError`` when the session is closed."""
        with trio.move_on_after(RPC_TIMEOUT_SECONDS):
            await self._send(Notification(method, params or {}))
            return
        raise TimedOutError(f"{self.peer} does not take {method}")

    async def _call(self, method: str, params: Params) -> Any:
        self._last_id += 1
        id, pending = self._last_id, _Pending(trio.Event())
        if self.closed.is_set():
            raise self._lost()
        self._pending[id] = pending
        try:
            await self._send(Request(id, method, params))
            await pending.done.wait()
        finally:
            del self._pending[id]
        if pending.error is not None:
            raise pending.error
        assert pending.answer is not None
        if pending.answer.error is not None:
            raise Error.from_wire(pending.answer.error)
        return pending.answer.result

    async def _send(self, message: Message) -> None:
        frame = codec.encode(to_value(message))
        try:
            await self._outbox.send(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise self._lost() from None

    def _lost(self) -> UnreachableError:
        return UnreachableError(f"no connection to {self.peer}: {self.close_reason}")

    async def _guarded(self, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        try:
            await task(*arguments)
        except Error as error:
            if not self.closed.is_set():
                self.ended_by_peer = self._transport.ended_by_peer
            self.close(error.message)

    async def _write(self) -> None:
        while True:
            try:
                frames = bytearray(await self._to_send.receive())
                while len(frames) < WRITE_BATCH_BYTES:
                    frames += self._to_send.receive_nowait()
            except trio.WouldBlock:
                pass
            except trio.ClosedResourceError:
                return
            await self._transport.send(bytes(frames))
            self._sent_at = trio.current_time()

    async def _ping(self) -> None:
        """So that silence means something: each side says something every HEARTBEAT_SECONDS."""
        ping = codec.encode(to_value(Notification(PING, {})))
        while True:
            await trio.sleep(HEARTBEAT_SECONDS)
            if trio.current_time() - self._sent_at >= HEARTBEAT_SECONDS / 2:
                try:
                    self._outbox.send_nowait(ping)
                except (trio.WouldBlock, trio.BrokenResourceError):
                    continue  # Full: what is in it says that we live. Broken: we are being closed.

    async def _read(self, nursery: trio.Nursery) -> None:
        while True:
            message = from_value(await self._transport.receive(idle_seconds=SDS_DOWN_AFTER_SECONDS))
            match message:
                case Answer():
                    self._answered(message)
                case Request():
                    self._requested(message, nursery)
                case Notification(method=method) if method != PING:
                    try:
                        self._inbox.send_nowait(message)
                    except trio.WouldBlock:
                        raise ProtocolError(
                            f"{self.peer} sends notifications faster than they can be handled"
                        ) from None

    def _answered(self, answer: Answer) -> None:
        pending = self._pending.get(answer.id)
        if pending is not None:
            pending.answer = answer
            pending.done.set()
        elif answer.id > self._last_id:
            raise ProtocolError(f"{self.peer} answers what was not asked")
        # Else its caller has stopped waiting.

    def _requested(self, request: Request, nursery: trio.Nursery) -> None:
        self._statistics.requests += 1
        # The other side keeps to the same limit, but for requests that it has given up waiting for.
        if self._statistics.handling >= IN_FLIGHT_MAX:
            busy = ConflictError(f"more than {IN_FLIGHT_MAX} requests in flight: try again later")
            nursery.start_soon(self._guarded, self._send, Answer(request.id, busy.to_wire(), None))
        else:
            self._statistics.handling += 1
            nursery.start_soon(self._guarded, self._serve, request)

    async def _serve(self, request: Request) -> None:
        try:
            answer = Answer(request.id, None, await self._handle(request.method, request.params))
        except Error as error:
            answer = Answer(request.id, error.to_wire(), None)
        finally:
            self._statistics.handling -= 1
        try:
            await self._send(answer)
        except UnreachableError:
            return
        except Error as error:  # What the handler returned, or an error's details, cannot be sent.
            _log.error("an answer cannot be sent", method=request.method, reason=error.message)
            failure = InternalError(f"{request.method}: {error.message}")
            await self._send(Answer(request.id, failure.to_wire(), None))

    async def _tell(self) -> None:
        while True:
            try:
                notification = await self._told.receive()
            except trio.ClosedResourceError:
                return
            self._statistics.notifications += 1
            try:
                await self._handle(notification.method, notification.params)
            except Error as error:
                _log.warning(
                    "notification refused", peer=str(self.peer), method=notification.method, reason=error.message
                )

    async def _handle(self, method: str, params: Params) -> Any:
        """Runs the handler; only ``pfvol.errors`` come out. Anything else is a bug: logged, and the session goes on."""
        try:
            with trio.fail_after(HANDLER_SECONDS_MAX):
                return await self._handler(method, params)
        except Error:
            raise
        except trio.TooSlowError:
            raise TimedOutError(f"{method} took longer than {HANDLER_SECONDS_MAX:g} s") from None
        except Exception as bug:
            if (expected := single_error(bug)) is not None:
                raise expected from bug
            _log.exception("a handler has failed", method=method, peer=str(self.peer))
            raise InternalError(f"{method} failed: the log of the other side says why") from bug


def single_error(raised: BaseException) -> Error | None:
    """The one expected error that was raised, be it inside of groups; None when there is another one too."""
    while isinstance(raised, BaseExceptionGroup) and len(raised.exceptions) == 1:
        raised = raised.exceptions[0]
    return raised if isinstance(raised, Error) else None
