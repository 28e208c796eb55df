"""The demonstration: the embedded cluster in a directory of its own, a mount, data in and out, and nothing left behind.

Each step prints the command that it runs, so that what is seen can be typed. It stops at the first thing that is not
as it must be, cleans up, and ends with a failure.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

MIB = 1024**2
DATA_MIB = 200
FIO_TIMEOUT_SECONDS = 90
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

    demo.say("every chunk has two copies, on different servers, that agree")
    demo.pfvol("vol", "verify", "vol1")
    demo.pfvol("vol", "list")


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
        except (DemoError, subprocess.TimeoutExpired) as error:
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
