"""What is installed is whole: the sdist builds a wheel, and the wheel works where there is no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(f"datapath.{path.stem}" for path in (ROOT / "datapath").glob("*.pyx"))

# Every extension is compiled once more here.
pytestmark = pytest.mark.timeout(600)


def run(*argv: str | Path, cwd: Path = Path("/")) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PFVOL_"))}
    words = [str(word) for word in argv]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"{' '.join(words)} ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it (not from the checkout)."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(packages: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it; its dependencies come from ours, so that nothing is fetched."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", packages[1])
    return environment


def test_sdist_has_every_source_and_nothing_generated(packages: tuple[Path, Path]) -> None:
    with tarfile.open(packages[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        f"datapath/{path.name}"
        for suffix in ("pyx", "pxd", "h", "pyi")
        for path in (ROOT / "datapath").glob(f"*.{suffix}")
    }
    assert sources - names == set()
    assert {name for name in names if name.endswith((".so", ".c", ".cpp", ".pyc"))} == set()
    assert {"README.md", "LICENSE", "Makefile", "setup.py", "pyproject.toml", "tests/conftest.py"} <= names


def test_wheel_has_every_extension_and_only_packages(packages: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(packages[1]) as archive:
        names = archive.namelist()
    for module in MODULES:
        assert any(name.startswith(module.replace(".", "/") + ".") and name.endswith(".so") for name in names), module
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"datapath", "pfvol", "mdm"}
    assert "pfvol/py.typed" in names


def test_installed_program_works_outside_the_checkout(installed: Path) -> None:
    """Goal: the command and every extension come from the installed copy."""
    assert run(installed / "bin" / "pfvol", "--version").startswith("pfvol ")
    assert "mount" in run(installed / "bin" / "pfvol", "--help")
    program = f"import importlib\nfor name in {MODULES!r}: print(importlib.import_module(name).__file__)"
    files = run(installed / "bin" / "python", "-c", program).split()
    assert [name for name in files if not name.startswith(str(installed))] == []
    assert len(files) == len(MODULES)


def test_installed_cluster_comes_up(installed: Path, tmp_path: Path) -> None:
    """Goal: nodes started by the installed program run the installed program, and stop."""
    pfvol = [installed / "bin" / "pfvol", "--data-dir", tmp_path / "data", "--json"]
    try:
        cluster = json.loads(run(*pfvol, "cluster", "up", "--sds", "2", "--devices", "1", "--device-size", "64MiB"))
        for node in cluster["nodes"]:
            environment = Path(f"/proc/{node['pid']}/environ").read_bytes().decode().split("\0")
            assert not [value for value in environment if value.startswith("PYTHONPATH=")]
        assert [sds["state"] for sds in json.loads(run(*pfvol, "sds", "list"))] == ["UP", "UP"]
    finally:
        run(*pfvol, "cluster", "down")
