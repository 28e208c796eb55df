"""The command line as a user runs it: a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND_TIMEOUT_SECONDS = 100.0


@dataclass(frozen=True)
class CliResult:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.stdout)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without pfvol's own variables, this checkout importable from any directory."""
    result = {key: value for key, value in os.environ.items() if not key.startswith("PFVOL_")}
    paths = [str(ROOT), *filter(None, result.get("PYTHONPATH", "").split(os.pathsep))]
    result["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    result["NO_COLOR"] = "1"
    return result | dict(extra or {})


def run_cli(
    *arguments: str | Path,
    data_dir: Path | None = None,
    json_output: bool = False,
    check: bool = False,
    env: Mapping[str, str] | None = None,
    timeout_seconds: float = COMMAND_TIMEOUT_SECONDS,
) -> CliResult:
    """Runs ``python -m pfvol.cli`` with ``arguments``; with ``check`` a failure is an AssertionError."""
    argv = [sys.executable, "-m", "pfvol.cli"]
    argv += ["--data-dir", str(data_dir)] if data_dir else []
    argv += ["--json"] if json_output else []
    argv += [str(argument) for argument in arguments]
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(env),
        timeout=timeout_seconds,
        check=False,
    )
    result = CliResult(done.returncode, done.stdout, done.stderr)
    if check and result.code:
        raise AssertionError(f"{' '.join(argv[1:])} ended with {result.code}\n{result.stdout}{result.stderr}")
    return result
