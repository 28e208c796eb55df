"""The house rules that a program can check: one import arrow, and linters that find nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
DATAPATH_MAY_CIMPORT = ("datapath", "libc", "libcpp", "cpython", "posix", "cython")
DATAPATH_MAY_IMPORT = (*DATAPATH_MAY_CIMPORT, *sys.stdlib_module_names)
LINES_PER_FILE_MAX = 700

IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+c?import\b|c?import\s+([\w.]+(?:\s*,\s*[\w.]+)*))", re.MULTILINE)
# Not what a program does for ever, until a test ends it.
SLEEP = re.compile(r"\b(?:time|trio)\.sleep\((?!600\))|\bimport sleep\b|\bselect\(\[\], \[\], \[\], (?!0\))")

pytestmark = pytest.mark.timeout(300)


def sources(*patterns: str) -> list[Path]:
    """Files of the repository that match, and are not generated."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:  # an unpacked sdist: no git, and nothing else lies about
        return [path for pattern in patterns for path in ROOT.glob(pattern.replace("*", "**/*", 1)) if path.is_file()]
    return [ROOT / line for line in found.stdout.splitlines()]


def check(*argv: str | Path) -> None:
    # cython-lint looks for its own helper on the PATH, also when the virtual environment is not activated.
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    words = [str(word) for word in argv]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{Path(argv[0]).name} found:\n{done.stdout}{done.stderr}"


def test_datapath_imports_nothing_of_ours() -> None:
    """Goal: the engines stand alone; neither pfvol nor mdm nor an event loop is under a byte's way."""
    files = sources("datapath/*.pyx", "datapath/*.pxd", "datapath/*.pyi", "datapath/*.py")
    assert files, "no source of datapath was found"
    wrong = []
    for path in files:
        for match in IMPORT.finditer(path.read_text()):
            names = [name.strip() for name in (match[1] or match[2]).split(",")]
            wrong += [f"{path.name}: {name}" for name in names if name.split(".")[0] not in DATAPATH_MAY_IMPORT]
    # typing_extensions is for the stubs only, which are never imported at run time.
    assert [line for line in wrong if not line.endswith("typing_extensions")] == []


def test_import_arrow() -> None:
    """Goal: mdm -> pfvol -> datapath, and the command line speaks REST only."""
    check(BIN / "lint-imports", "--no-cache")


def test_nothing_imports_tools_or_tests() -> None:
    """Goal: what is installed works without the checkout."""
    found = sources("pfvol/*.py", "mdm/*.py", "datapath/*.py")
    pattern = re.compile(r"^\s*(?:from|import)\s+(?:tools|tests)\b", re.MULTILINE)
    assert [str(path) for path in found if pattern.search(path.read_text())] == []


def test_no_asyncio() -> None:
    """Goal: one event loop library. asyncio beside trio is a second scheduler that nobody owns."""
    pattern = re.compile(r"^\s*(?:from|import)\s+asyncio\b", re.MULTILINE)
    assert [str(path) for path in sources("*.py") if pattern.search(path.read_text())] == []


def test_no_test_sleeps() -> None:
    """Goal: a test waits for what it wants to see, with a deadline (support/waiting.py)."""
    found = sources("tests/*.py")
    assert found, "no test was found"
    waiting = ROOT / "tests" / "support" / "waiting.py"
    assert [line for path in found if path != waiting for line in sleeps(path)] == []


def sleeps(path: Path) -> list[str]:
    """Where a file sleeps, also in programs that it holds as text (but in those that only wait to be killed)."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if SLEEP.search(line)
    ]


def test_files_stay_readable() -> None:
    """Goal: no file that nobody can hold in their head."""
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources("*.py", "*.pyx", "*.pxd")
        if (lines := len(path.read_text().splitlines())) > LINES_PER_FILE_MAX
    }
    assert long == {}


def test_no_generated_c_is_kept() -> None:
    """Goal: what Cython and the compiler make is not in the repository; only datapath has modules of that kind."""
    found = subprocess.run(
        ["git", "ls-files", "datapath/*.c", "datapath/*.cpp", "*.so"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == []


def test_ruff() -> None:
    check(BIN / "ruff", "check", "--no-cache", ".")


def test_mypy() -> None:
    check(BIN / "mypy")


def test_cython_lint() -> None:
    check(BIN / "cython-lint", *sources("datapath/*.pyx", "datapath/*.pxd"))


def test_shell_scripts_parse() -> None:
    scripts = [*sources("*.sh"), ROOT / ".ci" / "run"]
    for script in scripts:
        check("sh", "-n", script)
