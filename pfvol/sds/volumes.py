"""What this SDS knows of volumes and who may use them: a cache of the MDM's answers, and the decision on a capability.

Owns the cached ``VolumeInfo`` of every volume that was asked for. Assumes one trio thread, and that mapping ids only
grow: a capability is signed after its mapping was made durable. Promises: an answer of the MDM that was overtaken by a
change (a push, a revocation) while it travelled is thrown away and asked for again, so that a revoked mapping never
comes back; one question per volume is under way at any time however many ask; a mapping that the MDM has been asked
about is never a reason to ask again; questions that found no new mapping are at least MAPPING_REFRESH_SECONDS apart, so
that a client which has saved up old capabilities cannot keep the MDM busy.

What a known volume may do goes on while the MDM is away: nothing here forgets because of time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import trio

from pfvol.capability import Capability
from pfvol.constants import CHUNK_SIZE_BYTES, SEGMENT_CHUNKS, VOLUME_SIZE_BYTES_MAX
from pfvol.errors import DeniedError, NotFoundError, ProtocolError, TimedOutError, UnreachableError

MAPPING_REFRESH_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 0.2
SEGMENT_BYTES: Final = SEGMENT_CHUNKS * CHUNK_SIZE_BYTES

Call = Callable[[str, dict[str, Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """A volume as the MDM describes it; ``mappings`` is mapping id -> (SDC, read-only)."""

    size_bytes: int
    thick: bool
    commit: bool
    pool_id: int
    mappings: Mapping[int, tuple[int, bool]]

    @property
    def segments(self) -> int:
        return -(-self.size_bytes // SEGMENT_BYTES)


def parse_info(body: Any) -> VolumeInfo:
    """The info of ``map.volume`` and ``volume.changed``; ProtocolError when it is none."""
    try:
        size_bytes = body["size_bytes"]
        mappings = {int(mapping): (int(sdc), bool(read_only)) for sdc, mapping, read_only in body["mappings"]}
        pool_id = int(body["pool_id"])
        info = VolumeInfo(int(size_bytes), bool(body["thick"]), bool(body["commit"]), pool_id, mappings)
    except (TypeError, KeyError, ValueError) as error:
        raise ProtocolError(f"the MDM's description of a volume cannot be read: {error!r}") from None
    if not 0 < info.size_bytes <= VOLUME_SIZE_BYTES_MAX:
        raise ProtocolError(f"the MDM gives a volume a size of {info.size_bytes} bytes")
    return info


def check_mapping(info: VolumeInfo, capability: Capability) -> bool:
    """Whether the capability may write, by its mapping as it is now. Raises DeniedError when that does not exist."""
    mapping = info.mappings.get(capability.mapping_id)
    if mapping is None or mapping[0] != capability.sdc_id:
        raise DeniedError(f"mapping {capability.mapping_id} of volume {capability.volume_id} does not exist (any more)")
    return not (capability.read_only or mapping[1])


@dataclass(slots=True)
class _Question:
    """One that is under way to the MDM."""

    over: trio.Event = field(default_factory=trio.Event)
    gone: bool = False  # there is no such volume


class Volumes:
    """The cache. ``call`` asks the MDM and raises UnreachableError or TimedOutError while it is away."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._infos: dict[int, VolumeInfo] = {}
        self._changes: dict[int, int] = {}
        self._asking: dict[int, _Question] = {}
        self._settled: dict[int, int] = {}  # mapping ids up to here exist if they are in the info, and else never will
        self._in_vain_at: dict[int, float] = {}

    def __contains__(self, volume_id: int) -> bool:
        return volume_id in self._infos

    def __iter__(self) -> Iterator[int]:
        return iter(tuple(self._infos))

    def get(self, volume_id: int) -> VolumeInfo | None:
        return self._infos.get(volume_id)

    def put(self, volume_id: int, info: VolumeInfo) -> None:
        """The MDM has pushed this."""
        self._changes[volume_id] = self._changes.get(volume_id, 0) + 1
        self._infos[volume_id] = info

    def forget(self, volume_id: int) -> None:
        self._changes[volume_id] = self._changes.get(volume_id, 0) + 1
        self._infos.pop(volume_id, None)

    def revoke(self, volume_id: int, sdc_id: int) -> None:
        """From now on no capability of the SDC for the volume is accepted until the MDM has told of a new mapping."""
        self._changes[volume_id] = self._changes.get(volume_id, 0) + 1
        if info := self._infos.get(volume_id):
            kept = {mapping: owner for mapping, owner in info.mappings.items() if owner[0] != sdc_id}
            self._infos[volume_id] = replace(info, mappings=kept)

    def doubt(self) -> None:
        """The MDM was away: answers that are on their way may be from before."""
        for volume_id in {*self._infos, *self._asking}:
            self._changes[volume_id] = self._changes.get(volume_id, 0) + 1
        self._settled.clear()

    def decides(self, shown: Capability) -> bool:
        """Whether what is known is enough to grant or refuse the capability without asking the MDM."""
        info = self._infos.get(shown.volume_id)
        if info is not None and shown.mapping_id in info.mappings:
            return True
        return shown.mapping_id <= self._settled.get(shown.volume_id, -1)

    def may_ask(self, volume_id: int) -> bool:
        """False when an unknown mapping has just been asked for in vain: whoever shows another one has to wait."""
        return trio.current_time() - self._in_vain_at.get(volume_id, float("-inf")) >= MAPPING_REFRESH_SECONDS

    def settle(self, shown: Capability) -> None:
        """The MDM has answered a question that was put after ``shown`` had been: its word on the mapping is final."""
        volume_id = shown.volume_id
        info = self._infos.get(volume_id)
        if info is None or shown.mapping_id not in info.mappings:
            self._in_vain_at[volume_id] = trio.current_time()
        self._settled[volume_id] = max(self._settled.get(volume_id, -1), shown.mapping_id)

    async def answered(self, volume_id: int) -> None:
        """Returns when the question that is under way for the volume, if any, is over."""
        if (question := self._asking.get(volume_id)) is not None:
            await question.over.wait()

    async def refresh(self, volume_id: int) -> VolumeInfo:
        """Asks the MDM, however long it is away. Raises NotFoundError when there is no such volume."""
        while (question := self._asking.get(volume_id)) is not None:
            await question.over.wait()
            # Whoever asked may have failed or been cancelled; then the next one asks.
            if (info := self._infos.get(volume_id)) is not None:
                return info
            if question.gone:
                raise NotFoundError(f"there is no volume {volume_id}")
        question = self._asking[volume_id] = _Question()
        try:
            return await self._ask(volume_id)
        except NotFoundError:
            question.gone = True
            raise
        finally:
            self._asking.pop(volume_id).over.set()

    async def _ask(self, volume_id: int) -> VolumeInfo:
        while True:
            changes = self._changes.get(volume_id, 0)
            try:
                body = await self._call("map.volume", {"volume_id": volume_id})
            except (UnreachableError, TimedOutError):
                await trio.sleep(RETRY_SECONDS)
                continue
            except NotFoundError:
                self.forget(volume_id)
                raise
            # What the MDM pushed while its answer travelled may be newer than the answer, or older: ask again.
            if self._changes.get(volume_id, 0) == changes:
                info = parse_info(body)
                self._infos[volume_id] = info
                return info
