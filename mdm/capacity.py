"""What fits: pool quotas, thick reservations, and the candidates that placement may use. Pure.

A pool's capacity is a net quota: user data before copies. A thick volume reserves its whole size in the pool and a slot
for each copy on the SDSs, when it is created or extended; it is refused when either cannot hold it. A thin volume
reserves nothing and is refused only for its size: it may overcommit, and a write that finds no slot gets ENOSPC.

Of each SDS ``spare_percent`` of the slots is kept free of thick volumes, so that after a failure there is room to
rebuild into. By default (None) that is 10 % as in PowerFlex, but nothing in a protection domain of fewer than three
SDSs: with two there is nowhere to rebuild to, and the space would only be lost.
"""

from __future__ import annotations

from collections.abc import Mapping

from mdm.model import Pool, Sds, SdsState, State
from mdm.placement import Candidate, Placed, fits, place
from pfvol.constants import BLOCK_SIZE_BYTES, CHUNK_SIZE_BYTES, VOLUME_SIZE_BYTES_MAX
from pfvol.errors import CapacityError, ConflictError, InvalidError
from pfvol.units import format_size

SPARE_PERCENT_DEFAULT = 10
SPARE_SDS_MIN = 3  # fewer SDSs have nowhere to rebuild to


def volume_size(size_bytes: int) -> int:
    """``size_bytes`` rounded up to whole blocks; raises InvalidError when no volume can have that size."""
    if not isinstance(size_bytes, int) or isinstance(size_bytes, bool) or size_bytes < 1:
        raise InvalidError(f"a volume's size must be at least 1 byte, not {size_bytes}")
    rounded = -(-size_bytes // BLOCK_SIZE_BYTES) * BLOCK_SIZE_BYTES
    if rounded > VOLUME_SIZE_BYTES_MAX:
        raise InvalidError(f"a volume can have {format_size(VOLUME_SIZE_BYTES_MAX)} at most, not {size_bytes} bytes")
    return rounded


def spare_percent(state: State, pool: Pool) -> int:
    """The part of each SDS that this pool's thick volumes leave free."""
    if pool.spare_percent is not None:
        return pool.spare_percent
    return SPARE_PERCENT_DEFAULT if len(state.sds_of(pool.pd_id)) >= SPARE_SDS_MIN else 0


def thick_limit(state: State, pool: Pool, sds: Sds, thin_slots: int) -> int:
    """Copies of thick volumes that the SDS can still promise to this pool."""
    spare = -(-sds.slots * spare_percent(state, pool) // 100)
    return max(0, sds.slots - spare - sds.thick_slots - thin_slots)


def check_quota(pool: Pool, needed_bytes: int, pool_thin_bytes: int) -> None:
    """Raises CapacityError when the pool's quota cannot take ``needed_bytes`` more of thick volumes."""
    free = max(0, pool.capacity_bytes - pool.thick_bytes - pool_thin_bytes)
    if needed_bytes > free:
        raise _insufficient(pool, needed_bytes, free, "the pool's quota")


def place_chunks(
    state: State, pool: Pool, chunks: int, *, first_chunk: int, thick: bool, thin_slots: Mapping[int, int], seed: int
) -> Placed:
    """Places new chunks of a volume of ``pool`` on the SDSs that serve.

    Raises ConflictError with fewer than two of them, CapacityError when they cannot hold a thick volume's copies.
    """
    up = [sds for sds in state.sds_of(pool.pd_id) if sds.state is not SdsState.DOWN and sds.slots]
    if len(up) < 2:
        domain = state.pds[pool.pd_id].name
        raise ConflictError(
            f"two copies need at least 2 SDSs that are UP, and protection domain {domain} has {len(up)}: "
            "add one (pfvol sds add) or start one that is DOWN",
            up=len(up),
        )
    room = {sds.sds_id: thick_limit(state, pool, sds, thin_slots.get(sds.sds_id, 0)) for sds in up}
    if thick and not fits(chunks, list(room.values())):
        raise _insufficient(
            pool, chunks * CHUNK_SIZE_BYTES, _chunks_that_fit(room) * CHUNK_SIZE_BYTES, "its SDSs for two copies"
        )
    placed = place(
        chunks,
        [
            Candidate(
                sds_id=sds.sds_id,
                fault_set_id=sds.fault_set_id,
                weight=max(1, sds.slots - sds.thick_slots),
                limit=room[sds.sds_id] if thick else chunks,
                load=sds.copies / sds.slots,
                primary_excess=2 * sds.primaries - sds.copies,
            )
            for sds in up
        ],
        first_chunk=first_chunk,
        seed=seed,
    )
    assert placed is not None, "what fits can be placed"
    return placed


def _chunks_that_fit(room: Mapping[int, int]) -> int:
    """The most chunks whose two copies fit: half of all, but no more than the largest SDS finds partners for."""
    total = sum(room.values())
    return min(total // 2, total - max(room.values()))


def _insufficient(pool: Pool, needed: int, free: int, who: str) -> CapacityError:
    sizes = format_size(needed), format_size(free)
    if sizes[0] == sizes[1]:  # they differ by less than is shown
        sizes = f"{needed} bytes", f"{free} bytes"
    return CapacityError(
        f"insufficient capacity in pool {pool.name}: needs {sizes[0]}, {sizes[1]} free in {who}: "
        "make it smaller or thin, add capacity, or delete a volume",
        pool=pool.name,
        needed_bytes=needed,
        free_bytes=free,
    )
