"""What a node checks before any role runs, and how it ends; with the real program where that is what counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from pfvol import log, node
from pfvol.config import Config, NodeConfig
from pfvol.constants import STATE_VERSION
from pfvol.errors import ConfigError, ConflictError, VersionError
from pfvol.rpc import auth
from tests.support.processes import running


def config_in(data_dir: Path, *capabilities: str) -> Config:
    return Config(NodeConfig("n1", capabilities or ("mdm",), data_dir))


@pytest.fixture(autouse=True)
def keep_umask() -> Any:
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


class Roles:
    """Stands in for what is installed; each role notes when it starts and ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        monkeypatch.setattr(node, "find_role", lambda name: getattr(self, name))

    async def mdm(self, given: node.Node, *, task_status: Any) -> None:
        await self._serve("mdm", given, task_status)

    async def sds(self, given: node.Node, *, task_status: Any) -> None:
        await self._serve("sds", given, task_status)

    async def sdc(self, given: node.Node, *, task_status: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await self._serve("sdc", given, task_status)

    async def _serve(self, name: str, given: node.Node, task_status: Any) -> None:
        self.log.append(f"{name} starts")
        task_status.started({"name": given.name})
        await given.stopping.wait()
        self.log.append(f"{name} ends")


def test_roles_start_in_order_and_stop_in_the_reverse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = Roles(monkeypatch)
    reader, writer = os.pipe()
    node.run(config_in(tmp_path, "mdm", "sds", "sdc"), ready_fd=writer)
    assert roles.log == ["mdm starts", "sds starts", "sdc starts", "sdc ends", "sds ends", "mdm ends"]
    os.close(reader)


def test_a_role_that_fails_ends_the_node_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = Roles(monkeypatch)

    async def fails(given: node.Node, *, task_status: Any) -> None:
        async with trio.open_nursery():
            raise ConflictError("port 1 is in use")

    monkeypatch.setattr(roles, "sds", fails)
    with pytest.raises(ConflictError, match="port 1"):
        node.run(config_in(tmp_path, "mdm", "sds", "sdc"))
    assert roles.log == ["mdm starts", "mdm ends"]


def test_a_bug_in_a_role_is_not_dressed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = Roles(monkeypatch)

    async def fails(given: node.Node, *, task_status: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(roles, "mdm", fails)
    with pytest.raises(ZeroDivisionError):
        node.run(config_in(tmp_path))


def test_roles_of_a_checkout_are_found() -> None:
    from mdm.daemon import run_role

    assert node.find_role("mdm") is run_role
    with pytest.raises(ConfigError, match="provides the role"):
        node.find_role("gui")


def run_program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "pfvol.node", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False, **options)


@pytest.mark.parametrize(
    ("prepare", "exit_code", "says"),
    [
        (lambda d: None, 2, "secret is missing"),
        (lambda d: (d / "secret").write_bytes(b"short"), 2, "expected 32 bytes"),
        (lambda d: ((d / "secret").write_bytes(b"s" * 32), (d / "secret").chmod(0o644)), 2, "chmod 600"),
        (lambda d: ((d / "n1").mkdir(), (d / "n1" / "version").write_text("99\n")), 4, "version '99'"),
        (lambda d: ((d / "n1").mkdir(), (d / "n1" / "token").write_text("t")), 2, "was deleted"),
        (lambda d: (d / "n1").write_text("a file"), 2, "cannot be used"),
        (
            lambda d: (
                auth.create_secret(d / "secret"),
                (d / "n1").mkdir(),
                (d / "n1" / "version").write_text(f"{STATE_VERSION}\n"),
                (d / "n1" / "token").write_text("t"),
            ),
            2,
            "mdm.sqlite is missing",
        ),
        (
            lambda d: (auth.create_secret(d / "secret"), (d / "n1").mkdir(), (d / "n1" / "ports.json").write_text("{")),
            2,
            "damaged",
        ),
    ],
)
def test_a_directory_that_cannot_be_used_is_one_line(tmp_path: Path, prepare: Any, exit_code: int, says: str) -> None:
    prepare(tmp_path)
    done = run_program("--name", "n1", "--capabilities", "mdm", "--data-dir", str(tmp_path))
    assert done.returncode == exit_code, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pfvol: ")
    assert says in last
    assert "Traceback" not in done.stderr


def test_usage_errors() -> None:
    assert run_program("--config", "/nowhere.toml").returncode == 2
    assert run_program("--name", "n1").returncode == 2
    assert run_program("--nonsense").returncode == 2


def test_one_process_per_node(tmp_path: Path) -> None:
    with node._own(tmp_path / "n1"):
        auth.create_secret(tmp_path / "secret")
        done = run_program("--name", "n1", "--capabilities", "mdm", "--data-dir", str(tmp_path))
    assert done.returncode == 4
    assert f"process {os.getpid()}" in done.stderr


def test_readiness_goes_to_the_pipe_and_to_the_service_manager(tmp_path: Path) -> None:
    import socket

    auth.create_secret(tmp_path / "secret")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(str(tmp_path / "notify"))
    listener.settimeout(20)
    reader, writer = os.pipe()
    argv = [sys.executable, "-m", "pfvol.node", "--name", "n1", "--capabilities", "mdm", "--data-dir", str(tmp_path)]
    environment = os.environ | {
        "PFVOL_MDM_CONTROL_PORT": "0",
        "PFVOL_MDM_API_PORT": "0",
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
    }
    with (
        listener,
        open(tmp_path / "log", "w") as output,
        running([*argv, "--ready-fd", str(writer)], pass_fds=[writer], env=environment, stderr=output) as process,
    ):
        os.close(writer)
        with os.fdopen(reader) as pipe:
            infos = json.loads(pipe.readline())
        assert infos["mdm"]["control_address"][0] == "127.0.0.1"
        assert listener.recv(100) == b"READY=1"
        process.send_signal(signal.SIGTERM)
        assert listener.recv(100) == b"STOPPING=1"
        assert process.wait(20) == 0


def test_secrets_are_private_and_never_replaced(tmp_path: Path) -> None:
    secret = auth.create_secret(tmp_path / "sub" / "secret")
    assert (tmp_path / "sub" / "secret").stat().st_mode & 0o777 == 0o600
    assert auth.load_secret(tmp_path / "sub" / "secret") == secret
    with pytest.raises(ConflictError):
        auth.create_secret(tmp_path / "sub" / "secret")
    assert auth.load_secret(tmp_path / "sub" / "secret") == secret
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["secret"]


def test_another_version_is_refused(tmp_path: Path) -> None:
    with node._own(tmp_path / "n1"):
        pass
    (tmp_path / "n1" / "version").write_text(str(STATE_VERSION + 1))
    with pytest.raises(VersionError), node._own(tmp_path / "n1"):
        pass


def test_logs_are_json_lines_without_secrets(tmp_path: Path) -> None:
    file = tmp_path / "log" / "n1.log"
    try:
        log.configure("info", "json", file)
        logger = log.get_logger("here")
        logger.debug("not this")
        logger.info("this", secret=b"hush", capability_key="hush", count=3)
        lines = file.read_text().splitlines()
    finally:
        log.configure()
    assert "hush" not in lines[0]
    entry = json.loads(lines[0])
    assert (entry["event"], entry["part"], entry["count"], entry["level"]) == ("this", "here", 3, "info")
    assert len(lines) == 1
    assert time.strptime(entry["timestamp"][:19], "%Y-%m-%dT%H:%M:%S")


@pytest.mark.parametrize("options", [{"level": "loud"}, {"format": "xml"}, {"file": Path("/proc/nothing/log")}])
def test_a_log_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        log.configure(**options)
