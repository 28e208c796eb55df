"""Goal: kill -9 of the MDM at any moment loses nothing that was answered, and everybody comes back. Real processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from mdm.model import SdsState
from pfvol.client import AsyncClient, Endpoint
from pfvol.constants import HEARTBEAT_SECONDS, SDS_DOWN_AFTER_SECONDS
from pfvol.errors import Error
from pfvol.rpc import auth
from pfvol.rpc.client import Reconnecting, Session
from tests.support.waiting import poll_until, poll_until_async

KILLS = 6

NODE = """
import sys
from pathlib import Path
import trio
from pfvol.rpc import auth
from pfvol.rpc.client import connect

async def handler(method, params):
    return None

async def main(secret, host, port):
    address = (host, int(port))
    session = await connect(address, secret=auth.load_secret(Path(secret)), role="sds", name="s1", handler=handler)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        devices = [{"index": 0, "slots": 256, "device_id": "d0"}]
        params = {"node": "s1", "data_address": ["127.0.0.1", 5], "incarnation": 1, "devices": devices}
        await session.call("sds.register", params)

trio.run(main, *sys.argv[1:])
"""


class Process:
    """``python -m pfvol.node`` with the MDM role."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.infos: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        auth.create_secret(directory / "secret")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("PFVOL_")}
        self.environment |= {"PFVOL_MDM_CONTROL_PORT": "0", "PFVOL_MDM_API_PORT": "0"}

    def start(self, *, expect: int | None = None) -> str:
        """Waits until it serves, or until it has ended with the exit code expected; its stderr."""
        reader, writer = os.pipe()
        argv = [sys.executable, "-m", "pfvol.node", "--name", "m1", "--capabilities", "mdm"]
        argv += ["--data-dir", str(self.directory), "--ready-fd", str(writer)]
        log = self.directory / "stderr"
        with open(log, "w") as output:
            self._process = subprocess.Popen(argv, pass_fds=[writer], env=self.environment, stderr=output)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            line = pipe.readline()
        if expect is not None:
            assert (line, self._process.wait(20)) == ("", expect), log.read_text()
            self._process = None
            return log.read_text()
        assert line, log.read_text()
        self.infos = json.loads(line)["mdm"]
        return ""

    def stop(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(25)
            self._process = None

    def client(self) -> AsyncClient:
        token = (self.directory / "m1" / "token").read_text().strip()
        return AsyncClient(Endpoint(self.infos["api"], token), timeout_seconds=10)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path)
    yield made
    made.stop(signal.SIGKILL)


async def test_what_was_answered_survives_kills_and_nodes_come_back(process: Process) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    await trio.to_thread.run_sync(process.start)
    first = dict(process.infos)
    registered: list[int] = []
    answered: list[str] = []

    async def silent(method: str, params: dict[str, Any]) -> None:
        return None

    async def introduce(session: Session) -> None:
        params = {"node": "s1", "data_address": ["127.0.0.1", 5], "incarnation": 1, "devices": []}
        registered.append((await session.call("sds.register", params))["sds_id"])

    numbers = itertools.count(1)

    async def make_domains() -> bool:
        """One after the other, as fast as it goes, until the MDM is away."""
        with contextlib.suppress(Error):
            async with process.client() as client:
                for number in numbers:
                    await client.post("/pd/create", name=f"pd{number}")
                    answered.append(f"pd{number}")
        return False

    async with process.client() as client:
        await client.post("/pd/create", name="pd")
        await client.post("/sds/add", pd_id="pd", name="s1", capacity="1GiB")
    secret = auth.load_secret(process.directory / "secret")
    host, port = first["control_address"]
    sds = Reconnecting(host, port, secret=secret, role="sds", name="s1", handler=silent, on_connected=introduce)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sds.run)
        nursery.start_soon(poll_until_async, make_domains, 100)
        for kill in range(KILLS):
            count, wanted = len(answered), rng.randrange(1, 30)

            def more(goal: int = count + wanted, sessions: int = kill) -> bool:
                return len(answered) >= goal and len(registered) > sessions

            await poll_until_async(more)
            await trio.to_thread.run_sync(process.stop, signal.SIGKILL)
            await trio.to_thread.run_sync(process.start)
            assert process.infos == first
        await poll_until_async(lambda: len(registered) > KILLS)
        nursery.cancel_scope.cancel()
    assert set(registered) == {1}
    async with process.client() as client:
        names = {item["name"] for item in await client.get("/pd/list")}
    lost = [name for name in answered if name not in names]
    assert not lost
    assert len(answered) >= KILLS


async def test_a_frozen_node_is_down_after_its_silence_and_not_before(process: Process, tmp_path: Path) -> None:
    """SIGSTOP closes no connection: only silence tells."""
    await trio.to_thread.run_sync(process.start)
    async with process.client() as client:
        await client.post("/pd/create", name="pd")
        await client.post("/sds/add", pd_id="pd", name="s1", capacity="1GiB")
        host, port = process.infos["control_address"]
        argv = [sys.executable, "-c", NODE, str(process.directory / "secret"), host, str(port)]
        node = await trio.to_thread.run_sync(subprocess.Popen, argv)
        try:

            async def state(wanted: SdsState) -> bool:
                return bool((await client.get("/sds/s1"))["state"] == wanted)

            await poll_until_async(lambda: state(SdsState.UP))
            node.send_signal(signal.SIGSTOP)
            frozen = time.monotonic()
            await poll_until_async(lambda: state(SdsState.DOWN))
            assert SDS_DOWN_AFTER_SECONDS - HEARTBEAT_SECONDS < time.monotonic() - frozen < 8.0
        finally:
            node.kill()
            node.wait()


def test_ports_stay_and_a_taken_one_is_a_clear_error(process: Process) -> None:
    process.start()
    first = dict(process.infos)
    process.stop(signal.SIGTERM)
    host, port = first["control_address"]
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind((host, port))
        thief.listen()
        said = process.start(expect=4)
        assert f"{host}:{port} is in use" in said.splitlines()[-1]
    process.start()
    assert process.infos == first


def test_a_clean_stop_is_quick_also_with_connections_open(process: Process) -> None:
    process.start()
    host, port = process.infos["control_address"]
    with socket.create_connection((host, port)) as idle:
        idle.settimeout(5)
        assert idle.recv(4)
        started = time.monotonic()
        process.stop(signal.SIGTERM)
        assert time.monotonic() - started < 10
        poll_until(lambda: idle.recv(4096) == b"")


@pytest.mark.parametrize("what", ["mdm.sqlite", "version", "flipped"])
def test_a_half_deleted_or_damaged_directory_is_refused(process: Process, what: str) -> None:
    process.start()
    process.stop(signal.SIGTERM)
    directory = process.directory / "m1"
    if what == "flipped":
        database = bytearray((directory / "mdm.sqlite").read_bytes())
        database[0] ^= 0xFF
        (directory / "mdm.sqlite").write_bytes(database)
        said = process.start(expect=2)
    else:
        (directory / what).unlink()
        said = process.start(expect=2)
    assert said.splitlines()[-1].startswith("pfvol: ")
    assert str(directory) in said.splitlines()[-1]
