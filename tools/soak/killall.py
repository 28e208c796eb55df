"""Kills every process of a cluster under load, again and again, and looks whether anything that was durable is lost.

    python -m tools.soak.killall --rounds 20        (make crash ROUNDS=20)

Each round: ``tools.soak.stamps`` writes to a mounted volume; at a random moment SIGKILL goes to the MDM and all SDSs,
in random order, in half of the rounds to the mount's daemon as well; ``pfvol cluster up``, in some rounds after another
kill while they came up; what is in the volume is read and judged, also what earlier rounds wrote; ``pfvol vol verify``
has to be clean. Where the mount survived, no IO of the writer may have failed: it only waits. The first thing that is
wrong ends it with 1, and leaves the cluster as it is then.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from pfvol import childprocess
from tools.soak import stamps
from tools.soak.world import COMMAND_SECONDS, SoakError, World

VOLUME = "crash"
SHAPE = ["--sds", "3", "--devices", "2", "--device-size", "256MiB"]
VOLUME_SIZE = "256MiB"
BLOCKS = 6000
STAMPS_PER_ROUND = 1 << 32
LOAD_SECONDS = (0.2, 3.0)  # from the first durable writes to the kill
RECOVERY_SECONDS = (0.5, 3.0)  # from `cluster up` to the next kill
PROBLEMS_SHOWN = 20


@dataclass
class Soak(World):
    """A cluster, a mount, and what must be found in its volume."""

    expected: dict[int, stamps.Expected] = field(default_factory=dict)

    def victims(self, with_mount: bool) -> list[childprocess.Identity]:
        return [process for name, process in self.processes().items() if with_mount or name != "mount"]

    def round(self, number: int, rng: random.Random) -> str:
        """Raises SoakError; returns what to tell of a round that went well."""
        with_mount, delay_seconds = rng.random() < 0.5, rng.uniform(*LOAD_SECONDS)
        log = self.base / f"log{number}"
        with ExitStack() as cleanup:
            writer = cleanup.enter_context(self._writer(log, number, rng.randrange(2**32)))
            cleanup.callback(writer.kill)
            self._await_load(log, writer)
            time.sleep(delay_seconds)
            victims = self.victims(with_mount)
            rng.shuffle(victims)
            childprocess.kill(victims)
            in_recovery = rng.random() < 0.4
            if in_recovery:
                self._kill_in_recovery(rng.uniform(*RECOVERY_SECONDS))
            started = time.monotonic()
            self.pfvol("cluster", "up")
            up_seconds = time.monotonic() - started
            writer.terminate()
            if with_mount:
                # Before the writer is waited for: what it has open in the dead mount is given up with it.
                self.umount()
                writer.wait(COMMAND_SECONDS)
                self.mount()
            elif writer.wait(COMMAND_SECONDS):
                assert writer.stderr is not None
                raise SoakError(f"the mount was alive, and IO failed: {writer.stderr.read().decode()}")
        begun, durable = stamps.read_log(log, self.expected)
        log.unlink()
        self._judge()
        self.pfvol("vol", "verify", VOLUME)
        killed = f"{len(victims)} processes{' with the mount' if with_mount else ''}"
        again = ", and again while they came up" if in_recovery else ""
        return (
            f"{begun} writes, {durable} durable, killed {killed} {delay_seconds:.2f} s into it{again}, "
            f"up in {up_seconds:.1f} s: all {len(self.expected)} blocks right"
        )

    def _kill_in_recovery(self, delay_seconds: float) -> None:
        """Lets the cluster come up for a moment. The command may fail, as its nodes end, or have just been through."""
        command = subprocess.Popen(
            self.argv("cluster", "up"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            time.sleep(delay_seconds)
            childprocess.kill(self.victims(with_mount=False))
            command.wait(COMMAND_SECONDS)
        finally:
            command.kill()
            command.wait()

    def _writer(self, log: Path, number: int, seed: int) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "tools.soak.stamps", str(self.mountpoint / VOLUME), str(log)]
        argv += ["--seed", str(seed), "--first-stamp", str(number * STAMPS_PER_ROUND + 1), "--blocks", str(BLOCKS)]
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def _await_load(self, log: Path, writer: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + COMMAND_SECONDS
        while not log.exists() or log.stat().st_size < 100 * stamps.RECORD.size:
            if writer.poll() is not None or time.monotonic() > deadline:
                raise SoakError("the writer does not come to write")
            time.sleep(0.02)

    def _judge(self) -> None:
        """Reads every block that was ever written, around the page cache and through it."""
        problems = []
        for flags in (os.O_DIRECT, 0):
            descriptor = os.open(self.mountpoint / VOLUME, os.O_RDONLY | flags)
            try:
                with mmap.mmap(-1, stamps.BLOCK_BYTES) as buffer:
                    for block, state in sorted(self.expected.items()):
                        os.preadv(descriptor, [buffer], block * stamps.BLOCK_BYTES)
                        if problem := state.problem(block, buffer[:]):
                            problems.append(f"{problem} (read {'direct' if flags else 'through the page cache'})")
            finally:
                os.close(descriptor)
        if problems:
            shown = "\n".join(problems[:PROBLEMS_SHOWN])
            raise SoakError(f"{len(problems)} of {len(self.expected)} blocks are wrong:\n{shown}")


def main() -> int:
    parser = argparse.ArgumentParser(description="kill -9 of a whole cluster under load: is anything lost?")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}: python -m tools.soak.killall --rounds {arguments.rounds} --seed {arguments.seed}")
    soak, rng = Soak(Path(tempfile.mkdtemp(prefix="pfvol-crash-"))), random.Random(arguments.seed)
    try:
        soak.begin(SHAPE, [VOLUME], VOLUME_SIZE)
        for number in range(1, arguments.rounds + 1):
            print(f"round {number}: {soak.round(number, rng)}", flush=True)
        soak.end()
    except (SoakError, OSError, subprocess.TimeoutExpired) as error:
        print(f"FAILED: {error}\nThe cluster is left as it is in {soak.data_dir}.", flush=True)
        return 1
    shutil.rmtree(soak.base)
    print(f"passed: {arguments.rounds} rounds, nothing lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
