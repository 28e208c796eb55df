"""The checksum alone: seeded check values over blocks, and the plain crc32c."""

from __future__ import annotations

import os

from datapath import checksum
from tools.bench.layers import Row, main, rate

MIB = 1024**2


def measure(seconds: float) -> list[Row]:
    one_block, one_mib = os.urandom(4096), os.urandom(MIB)

    def megabytes(data: bytes, times: int) -> float:
        for _ in range(times):
            checksum.crc32c(data)
        return len(data) * times / 1e6

    def checks() -> float:
        checksum.range_checks(1, 0, 0, one_mib)
        return MIB / 1e6

    return [
        rate("crc32c of 4 KiB", "MB/s", seconds, lambda: megabytes(one_block, 256)),
        rate("crc32c of 1 MiB", "MB/s", seconds, lambda: megabytes(one_mib, 4)),
        rate("check values of 1 MiB", "MB/s", seconds, checks),
    ]


if __name__ == "__main__":
    main("checksum", measure)
