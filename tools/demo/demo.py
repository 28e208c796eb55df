"""The demonstration: the embedded cluster in a directory of its own, a mount, data in and out, a server killed under
load and brought back, and nothing left behind.

Each step prints the command that it runs, so that what is seen can be typed. It stops at the first thing that is not
as it must be, cleans up, and ends with a failure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pfvol import localcluster
from pfvol.errors import Error
from tools.demo.writers import Writers

MIB = 1024**2
DATA_MIB = 200
FIO_TIMEOUT_SECONDS = 90
VICTIM = "sds2"
WRITERS_OFFSET = 640 * MIB
BEFORE_SECONDS, ALONE_SECONDS = 2.0, 4.0
HEALTH_SECONDS = 60.0
PFVOL = [sys.executable, "-m", "pfvol.cli"]


class DemoError(Exception):
    """Something was not as it must be."""


class Demo:
    """Runs commands of one data directory, showing them."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        print(f"\n[{time.monotonic() - self.started:5.1f} s] {text}", flush=True)

    def run(self, *argv: str | Path, timeout_seconds: float = 60) -> None:
        words = [str(word) for word in argv]
        print(f"  $ {' '.join(words)}", flush=True)
        done = subprocess.run(words, check=False, stdin=subprocess.DEVNULL, timeout=timeout_seconds)
        if done.returncode:
            raise DemoError(f"{words[0]} ended with {done.returncode}")

    def pfvol(self, *arguments: str | Path) -> None:
        words = [str(argument) for argument in arguments]
        print(f"  $ pfvol --data-dir {self.data_dir} {' '.join(words)}", flush=True)
        argv = [*PFVOL, "--data-dir", str(self.data_dir), *words]
        done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, timeout=120)
        if done.returncode:
            raise DemoError(f"pfvol {words[0]} ended with {done.returncode}")

    def health(self) -> Any:
        """``system status``, not shown."""
        argv = [*PFVOL, "--data-dir", str(self.data_dir), "--json", "system", "status"]
        done = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60)
        if done.returncode:
            raise DemoError(f"pfvol system status ended with {done.returncode}")
        return json.loads(done.stdout)["health"]

    def await_health(self, *wanted: str) -> None:
        limit = time.monotonic() + HEALTH_SECONDS
        while (found := self.health()) not in wanted:
            if time.monotonic() > limit:
                raise DemoError(f"health is {found}, not {' or '.join(wanted)}, after {HEALTH_SECONDS:.0f} s")
            time.sleep(0.1)


def show(demo: Demo, mountpoint: Path, scratch: Path) -> None:
    demo.say("mount: with no cluster configured, an embedded one starts (an MDM and three SDSs, a process each)")
    demo.pfvol("mount", mountpoint)
    demo.run("ls", "-lh", mountpoint)
    demo.pfvol("cluster", "status")
    demo.pfvol("pool", "list")
    demo.pfvol("vol", "list")

    demo.say(f"dd: {DATA_MIB} MiB in, through the page cache and back around it")
    volume, original, copy = mountpoint / "vol1", scratch / "original", scratch / "copy"
    demo.run("dd", "if=/dev/urandom", f"of={original}", "bs=1M", f"count={DATA_MIB}", "status=none")
    demo.run("dd", f"if={original}", f"of={volume}", "bs=1M", "conv=notrunc,fsync")
    demo.run("dd", f"if={volume}", f"of={copy}", "bs=1M", f"count={DATA_MIB}", "iflag=direct")
    compare(original, copy)

    if shutil.which("fio"):
        demo.say("fio: random reads and writes, direct, 32 at a time, every block verified")
        options = ["--rw=randrw", "--bs=4k", "--size=64M", f"--offset={512 * MIB}", "--iodepth=32", "--direct=1"]
        options += ["--ioengine=libaio", "--verify=crc32c", "--verify_state_save=0"]
        options += ["--minimal", f"--output={scratch / 'fio'}"]
        demo.run("fio", "--name=demo", f"--filename={volume}", *options, timeout_seconds=FIO_TIMEOUT_SECONDS)
        print("  fio found every block as it was written")

    survive(demo, volume)

    demo.say("what went in first still comes out, and every chunk has two copies, on different servers, that agree")
    demo.run("dd", f"if={volume}", f"of={copy}", "bs=1M", f"count={DATA_MIB}", "iflag=direct", "status=none")
    compare(original, copy)
    demo.pfvol("vol", "verify", "vol1")
    demo.pfvol("vol", "list")


def survive(demo: Demo, volume: Path) -> None:
    """A server dies under load, and comes back."""
    demo.say("load: four threads write 4 KiB blocks, direct, as fast as they can; then kill -9 of one of three servers")
    with Writers(volume, WRITERS_OFFSET) as writers:
        time.sleep(BEFORE_SECONDS)
        killed = time.monotonic()
        kill(demo, VICTIM)
        demo.await_health("DEGRADED")
        demo.pfvol("system", "status")
        time.sleep(ALONE_SECONDS)
        demo.say("the server comes back and is brought up to date, while the load goes on")
        demo.pfvol("cluster", "start-node", VICTIM)
        demo.pfvol("rebuild", "status", "default", "--watch")
        demo.await_health("OK")
        writers.stop()
        ended = time.monotonic()
    if writers.errors:
        raise DemoError(f"the load met errors: {', '.join(writers.errors)}")
    demo.pfvol("system", "status")
    stall = writers.longest_stall(killed, ended)
    print(f"  {writers.count} writes, no error; the longest time without one that came back: {stall:.2f} s")
    wrong = writers.wrong_blocks()
    if wrong:
        raise DemoError(f"{wrong} blocks do not hold what was written there last")
    print("  every block holds what was written there last")


def kill(demo: Demo, node: str) -> None:
    """kill -9 of the node's process, after a look whether it still is that."""
    nodes = {one["name"]: one for one in localcluster.status(demo.data_dir)["nodes"]}
    print(f"  $ kill -9 {nodes[node]['pid']}          # {node}", flush=True)
    localcluster.kill_node(demo.data_dir, node)


def compare(original: Path, copy: Path) -> None:
    digests = []
    for path in (original, copy):
        with path.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    print(f"  sha256 in  {digests[0]}\n  sha256 out {digests[1]}")
    if digests[0] != digests[1]:
        raise DemoError("what came out is not what went in")


def main() -> int:
    parser = argparse.ArgumentParser(description="Shows pfvol at work.")
    parser.add_argument("--keep", action="store_true", help="leave the volume mounted at the end")
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="pfvol-demo-"))
    demo, mountpoint, scratch = Demo(base / "data"), base / "mnt", base / "scratch"
    mountpoint.mkdir()
    scratch.mkdir()
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, base, ignore_errors=True)
        cleanup.callback(clean_up, demo, mountpoint)
        try:
            show(demo, mountpoint, scratch)
            if not arguments.keep:
                demo.say("unmount: the embedded cluster stops with it")
                demo.pfvol("umount", mountpoint)
        except (DemoError, Error, OSError, subprocess.TimeoutExpired) as error:
            print(f"\nThe demonstration failed: {error}", file=sys.stderr)
            print_logs(demo.data_dir)
            return 1
        if arguments.keep:
            cleanup.pop_all()
            shutil.rmtree(scratch)
            demo.say(f"left mounted at {mountpoint}; this ends it:")
            print(f"  pfvol --data-dir {demo.data_dir} umount {mountpoint} && rm -r {base}")
            return 0
    demo.say("done: nothing is left behind")
    return 0


def clean_up(demo: Demo, mountpoint: Path) -> None:
    """Unmounts and stops whatever of it is there: the demonstration may have failed anywhere."""
    if mountpoint.is_mount():
        subprocess.run([*PFVOL, "--data-dir", str(demo.data_dir), "umount", str(mountpoint)], check=False, timeout=120)
    if (demo.data_dir / "cluster.json").exists():
        subprocess.run([*PFVOL, "--data-dir", str(demo.data_dir), "-q", "cluster", "down"], check=False, timeout=120)


def print_logs(data_dir: Path) -> None:
    for log in sorted(data_dir.glob("*/log")):
        print(f"--- the end of {log}", file=sys.stderr)
        print("\n".join(log.read_text(errors="replace").splitlines()[-10:]), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
