"""The script that makes a machine ready: says exactly what is missing, and is quiet where nothing is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "setup" / "system.sh"


def run(purpose: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "PYTHON": sys.executable, "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(["/bin/sh", SCRIPT, purpose], env=environment, capture_output=True, text=True, check=False)


def test_ready_machine_is_left_alone() -> None:
    """Goal: where the suite runs everything is there; the script says nothing and calls no package manager."""
    done = run("test", os.environ["PATH"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_user_without_rights_is_told_what_to_install(tmp_path: Path) -> None:
    """Goal: one command to copy, with every missing package in it; nothing is tried."""
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    done = run("demo", str(tmp_path))
    assert done.returncode == 1
    (command,) = [line.split() for line in done.stderr.splitlines() if "apt-get install" in line]
    assert {"build-essential", "pkg-config", "libfuse3-dev", "fuse3", "fio"} <= set(command)
    assert "python3-venv" not in command


def test_old_python_is_named(tmp_path: Path) -> None:
    """Goal: a Python that is too old is found before anything is made with it."""
    for tool in ("gcc", "g++", "pkg-config", "fusermount3", "id"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "/bin/false")
    python = tmp_path / "old"
    # Has the modules and headers it is asked for first, and fails the question for its version.
    python.write_text(
        '#!/bin/sh\n[ "$1" = -V ] && { echo Python 3.9.1; exit 0; }\ncase $2 in *version_info*) exit 1;; esac\n'
    )
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python)}
    done = subprocess.run(["/bin/sh", SCRIPT, "build"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Python 3.11 or later" in done.stderr
    assert "Python 3.9.1" in done.stderr
