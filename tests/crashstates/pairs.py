"""One SDS of a pair has lost power, the other goes on: started again, they agree, and nothing acknowledged is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import trio

from datapath import wire
from tests.crashstates.disk import PAGE, ZEROS
from tests.crashstates.oracle import Oracle
from tests.crashstates.workloads import SDC, SLOTS, VOLUMES
from tests.support.dataclient import DataClient
from tests.support.sdspair import PlayedMdm, running_pair
from tests.support.waiting import poll_until_async

BLOCKS: Final = 64  # of each chunk, the first ones: more than any workload writes to
CHUNKS: Final = 4


async def _read(client: DataClient, volume: int, chunk: int) -> bytes:
    async def served() -> bytes | None:
        reply = await client.read(volume, chunk, 0, BLOCKS * PAGE)
        assert reply.status in (wire.ST_OK, wire.ST_NOT_READY), f"status {reply.status}"
        return reply.payload if reply.status == wire.ST_OK else None

    content = await poll_until_async(served, what=f"chunk {chunk} of volume {volume}")
    assert content is not None
    return content


async def _agreed(directory: Path, device_count: int) -> list[dict[tuple[int, int], bytes]]:
    """What each of the two says of every chunk, when they have agreed."""
    mdm = PlayedMdm()
    for volume in VOLUMES:
        mdm.add_volume(volume, CHUNKS)
    said: list[dict[tuple[int, int], bytes]] = []
    async with running_pair(directory, mdm, slots=SLOTS, device_count=device_count) as pair:
        for sds in (pair.one, pair.two):
            async with await sds.client(SDC) as client:
                for volume in VOLUMES:
                    assert (await client.capability(volume, mdm.map(volume, SDC))).status == wire.ST_OK
                said.append({(v, chunk): await _read(client, v, chunk) for v in VOLUMES for chunk in range(CHUNKS)})
    return said


def problems_of_a_cut(directory: Path, device_count: int, oracles: list[Oracle]) -> list[str]:
    """``directory`` has both SDSs' files, one as its cache had them, the other as its disk was left."""
    found = []
    one, two = trio.run(_agreed, directory, device_count)
    for chunk in one.keys() | two.keys():
        if chunk in oracles[0].purging:
            continue
        if one[chunk] != two[chunk]:
            found.append(f"chunk {chunk}: the copies differ after they agreed")
        for block in range(BLOCKS):
            content, key = one[chunk][block * PAGE : (block + 1) * PAGE], (*chunk, block)
            if all(content not in oracle.since_acknowledged(key) for oracle in oracles):
                what = "zeros" if content == ZEROS else "older or other bytes"
                found.append(f"block {key}: {what}, and it was acknowledged")
    return found
