"""What is written comes back: fio and dd on two mounted volumes, through the page cache and around it, and again later.

    python -m tools.soak.verify --mib 256        (make verify)

For direct and for buffered IO: fio writes and reads two volumes at once at random, in blocks of 512 B to 1 MiB and 32
at a time, each block with a crc32c in it, and reads all of it back; again after unmount and mount, and again after a
restart of the cluster. A volume is then spoilt on purpose, and fio has to see it. Last dd: odd sizes and offsets,
across chunk boundaries, in and out, next to a plain file on which the same is done. ``pfvol vol verify`` has to be
clean in between. The first thing that is wrong ends it with 1, and leaves everything as it is then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.soak.world import SoakError, World, run

MIB = 1024**2
CHUNK_BYTES = 4 * MIB
VOLUMES = ("left", "right")
SHAPE = ("--sds", "3", "--devices", "2")
BLOCK_SIZES = "512/20:1536/10:4k/30:12k/10:68k/15:512k/10:1m/5"
MODES = {"direct": "--direct=1", "buffered": "--direct=0"}
READS: Sequence[tuple[str, ...]] = (("bs=1M", "iflag=direct"), ("bs=5M",), ("bs=100003", "iflag=direct"), ("bs=4097",))
DD_MIB = 48
TOOL_SECONDS = 900


@dataclass(frozen=True)
class Dd:
    """One dd from a file of random bytes into a volume, and out of it again. Counts in blocks of ``block_bytes``."""

    block_bytes: int
    count: int
    skip: int
    seek: int
    flags: str = ""

    def argv(self, source: Path, target: Path, *flags: str) -> list[str]:
        words = ["dd", f"if={source}", f"of={target}", f"bs={self.block_bytes}", f"count={self.count}", "status=none"]
        return [
            *words,
            "conv=notrunc,fsync",
            f"skip={self.skip}",
            f"seek={self.seek}",
            *(flag for flag in flags if flag),
        ]

    def out_argv(self, source: Path, target: Path) -> list[str]:
        """The part that was written, as a file of its own."""
        return Dd(self.block_bytes, self.count, self.seek, 0).argv(source, target, self.flags.replace("oflag", "iflag"))


DDS = (
    Dd(1000, 997, 3, 4193),  # from 4 193 000, before the first chunk's end, to the second chunk
    Dd(1000, 211, 7, 8301, "oflag=direct"),  # across the end of the second
    Dd(4097, 1023, 5, 1021),
    Dd(4097, 513, 1, 3071, "oflag=direct"),
    Dd(5 * MIB, 3, 1, 1),
    Dd(5 * MIB, 3, 2, 5, "oflag=direct"),
    Dd(513, 1, 1, CHUNK_BYTES // 513),  # one block, on both sides of a boundary
    Dd(4096, 700, 9, 1000, "oflag=direct"),
    Dd(MIB, 8, 0, 3),
    Dd(1, 5000, 11, 2 * CHUNK_BYTES - 2500),
)


class Verify(World):
    """The steps; each raises SoakError, or prints what it found."""

    def __init__(self, base: Path, fio_mib: int, seed: int) -> None:
        super().__init__(base)
        self.fio_mib, self.seed = fio_mib, seed
        self.engine = fio_engine(base)

    @property
    def files(self) -> list[Path]:
        return [self.mountpoint / volume for volume in VOLUMES]

    def all(self) -> None:
        self.begin(SHAPE, VOLUMES, f"{max(self.fio_mib, DD_MIB)}MiB")
        for mode in MODES:
            self.fio(mode, "written and verified", "--do_verify=1", f"--randseed={self.seed}")
            self.umount()
            self.mount()
            self.fio(mode, "verified after unmount and mount", "--verify_only", f"--randseed={self.seed}")
            self.pfvol("cluster", "restart")
            self.fio(mode, "verified after a restart of the cluster", "--verify_only", f"--randseed={self.seed}")
            self.vol_verify()
            self.seed += 1
        self.spoil()
        self.dd()
        self.vol_verify()
        self.end()

    def fio(self, mode: str, what: str, *options: str) -> None:
        """Both volumes at once. Its own reads go to the servers: it drops what is cached of a file before it begins."""
        argv = ["fio", "--rw=randrw", f"--size={self.fio_mib}m", f"--bssplit={BLOCK_SIZES}", "--blockalign=512"]
        argv += ["--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fallocate=none"]
        argv += ["--end_fsync=1", "--output-format=json", MODES[mode], self.engine, *options]
        for file in self.files:
            argv += [f"--name={file.name}", f"--filename={file}"]
        started = time.monotonic()
        said = run(*argv, timeout_seconds=TOOL_SECONDS, cwd=self.base)
        jobs = json.loads(said[said.index("{") :])["jobs"]
        if any(job["error"] for job in jobs):
            raise SoakError(said)
        blocks, mib = (sum(job["write"][key] for job in jobs) for key in ("total_ios", "io_kbytes"))
        seconds = time.monotonic() - started
        print(f"fio {mode}: {what}: {blocks} blocks, {mib / 1024:.0f} MiB, in {seconds:.1f} s", flush=True)

    def vol_verify(self) -> None:
        for volume in VOLUMES:
            self.pfvol("vol", "verify", volume)
        print("vol verify: clean", flush=True)

    def spoil(self) -> None:
        """The verdicts above are worth something: of what is overwritten here, fio misses nothing."""
        with self.files[0].open("r+b") as file:
            file.write(random.Random(self.seed).randbytes(self.fio_mib * MIB // 4))
        for mode in MODES:
            try:
                self.fio(mode, "verified though spoilt", "--verify_only", f"--randseed={self.seed - 1}")
            except SoakError:
                print(f"fio {mode}: sees that a volume was spoilt on purpose", flush=True)
            else:
                raise SoakError("fio does not see that a quarter of a volume was overwritten: it verifies nothing")

    def dd(self) -> None:
        source, model, out = (self.base / name for name in ("source", "model", "out"))
        source.write_bytes(random.Random(self.seed).randbytes(DD_MIB * MIB))
        for file in self.files:
            shutil.copyfile(file, model)
            for step in DDS:
                run(*step.argv(source, file, step.flags), timeout_seconds=TOOL_SECONDS)
                run(*step.argv(source, model), timeout_seconds=TOOL_SECONDS)
                out.unlink(missing_ok=True)
                run(*step.out_argv(file, out), timeout_seconds=TOOL_SECONDS)
                with source.open("rb") as original:
                    original.seek(step.skip * step.block_bytes)
                    if original.read(step.count * step.block_bytes) != out.read_bytes():
                        raise SoakError(f"dd: what came out of {file} is not what went in: {step}")
            self._compare(file, model, out)
        print(f"dd: {len(DDS) * len(self.files)} times in and out, each equal, and nothing else changed", flush=True)

    def _compare(self, file: Path, model: Path, out: Path) -> None:
        """All of the volume, read in several ways, is the plain file on which the same was done."""
        size = model.stat().st_size
        for words in READS:
            with file.open("rb") as cached:
                os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            run("dd", f"if={file}", f"of={out}", "status=none", *words, timeout_seconds=TOOL_SECONDS)
            if out.stat().st_size != size:
                raise SoakError(f"dd {' '.join(words)}: {out.stat().st_size} bytes came out of {file}, not {size}")
            run("cmp", str(model), str(out), timeout_seconds=TOOL_SECONDS)


def fio_engine(scratch: Path) -> str:
    """io_uring queues buffered IO too. Where it is forbidden, as in many containers, that goes one at a time."""
    probe = ["fio", "--name=probe", f"--filename={scratch / 'probe'}", "--size=4k", "--rw=write", "--ioengine=io_uring"]
    try:
        run(*probe, timeout_seconds=TOOL_SECONDS, cwd=scratch)
    except SoakError:
        return "--ioengine=libaio"
    return "--ioengine=io_uring"


def main() -> int:
    parser = argparse.ArgumentParser(description="fio and dd on two volumes: does what is written come back?")
    parser.add_argument("--mib", type=int, default=256, help="of each volume that fio works on")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}: python -m tools.soak.verify --mib {arguments.mib} --seed {arguments.seed}")
    verify = Verify(Path(tempfile.mkdtemp(prefix="pfvol-verify-")), arguments.mib, arguments.seed)
    try:
        verify.all()
    except (SoakError, OSError) as error:
        print(f"FAILED: {error}\nThe cluster is left as it is in {verify.data_dir}.", flush=True)
        return 1
    shutil.rmtree(verify.base)
    print("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
