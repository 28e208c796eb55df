"""The command line against a real MDM: documents, tables, exit codes, and what errors say.

In this process, in a thread beside the server's loop, because a hundred interpreters take their time; as a process of
its own the program is tested in test_cli_usage.py and in everything that uses a cluster.
"""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import trio

from mdm.commands import SetSdsState
from pfvol.cli.app import run
from pfvol.errors import (
    EXIT_CAPACITY,
    EXIT_CONFLICT,
    EXIT_DENIED,
    EXIT_NOT_FOUND,
    EXIT_USAGE,
)
from tests.support.api import GIB, TOKEN, Api
from tests.support.cli import CliResult


def invoke(words: list[str], env: dict[str, str]) -> CliResult:
    """One invocation of the program; nothing else may print meanwhile."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for key, value in env.items():
            patch.setenv(key, value)
        code = run(words)
    return CliResult(code, out.getvalue(), err.getvalue())


class Cli:
    """``pfvol`` of the test's MDM: found through a data dir's cluster.json, as a user's is."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir

    async def run(self, *words: str, json_output: bool = False, env: dict[str, str] | None = None) -> CliResult:
        options = ["--data-dir", str(self.data_dir), *(["--json"] if json_output else [])]
        return await trio.to_thread.run_sync(invoke, [*options, *words], env or {})

    async def json(self, *words: str) -> Any:
        result = await self.run(*words, json_output=True)
        assert result.code == 0, result.stderr
        return result.json

    async def text(self, *words: str) -> str:
        result = await self.run(*words)
        assert result.code == 0, result.stderr
        return result.stdout


@pytest.fixture
def pfvol(api: Api, tmp_path: Path) -> Cli:
    document = {"api": api.endpoint.url, "token": TOKEN, "mdm": "127.0.0.1:9"}
    (tmp_path / "cluster.json").write_text(json.dumps(document))
    return Cli(tmp_path)


async def test_a_day_of_administration(api: Api, pfvol: Cli) -> None:
    """Goal: everything from nothing to a mapped volume and back, with the commands alone."""
    pd = await pfvol.json("pd", "create", "pd1", "-d", "of the tests")
    rack = await pfvol.json("fault-set", "create", "pd1", "rack1")
    for name in ("s1", "s2"):
        sds = await pfvol.json("sds", "add", "pd1", name, "2GiB", *(["--fault-set", "rack1"] if name == "s1" else []))
        assert sds["state"] == "DOWN"
        await api.bring_up(name)
    assert sds["pd_id"] == pd["id"]
    assert [row["fault_set_id"] for row in await pfvol.json("sds", "list")] == [rack["id"], None]
    pool = await pfvol.json("pool", "create", "pd1", "pool1", "1500MB", "--spare-percent", "0", "--rebuild-delay", "3")
    assert (pool["total_capacity_bytes"], pool["rebuild_delay_seconds"]) == (1_500_000_000, 3)
    volume = await pfvol.json("vol", "create", "pool1", "v1", "512MiB", "--thick")
    assert (volume["provisioning"], volume["size_bytes"]) == ("thick", GIB // 2)
    sdc = await pfvol.json("sdc", "add", "host1")
    mapped = await pfvol.json("vol", "map", volume["id"], "host1", "--ro", "--iops-limit", "10")
    assert mapped["mappings"][0]["sdc_id"] == sdc["id"]
    assert mapped["mappings"][0]["access_mode"] == "readOnly"
    assert (await pfvol.json("vol", "extend", "v1", "64MiB"))["size_bytes"] == 576 * 2**20
    assert (await pfvol.json("vol", "extend", "v1", "--to", "1GiB"))["size_bytes"] == GIB
    shown = await pfvol.json("vol", "show", "v1", "--chunks")
    assert len(shown["chunks"]) == 256
    assert (await pfvol.json("vol", "unmap", "v1", sdc["id"]))["mapping_count"] == 0
    assert (await pfvol.json("pool", "set", "pool1", "--durability", "commit"))["durability"] == "commit"
    for words in (
        ("vol", "delete", "v1"),
        ("sdc", "remove", "host1"),
        ("pool", "delete", "pool1"),
        ("sds", "remove", "s1"),
        ("sds", "remove", "s2"),
        ("fault-set", "delete", "rack1"),
        ("pd", "delete", pd["id"]),
    ):
        assert (await pfvol.json(*words))["deleted"] is True
    assert await pfvol.json("pd", "list") == []
    types = [event["type"] for event in await pfvol.json("event", "list")]
    assert types[0] == "PD_CREATE"
    assert types[-1] == "PD_DELETE"


async def test_chunks_of_a_large_volume(api: Api, pfvol: Cli) -> None:
    """Goal: more than one answer holds, each chunk once and in order."""
    await api.make_pool()
    await api.client.post("/vol/create", pool_id="pool", name="large", size="10GiB")
    shown = await pfvol.json("vol", "show", "large", "--chunks")
    assert [chunk["index"] for chunk in shown["chunks"]] == list(range(2560))


async def test_create_prints_the_id_alone(api: Api, pfvol: Cli) -> None:
    """Goal: `id=$(pfvol vol create …)` works; the note for people is on stderr, and -q silences it."""
    result = await pfvol.run("pd", "create", "pd1")
    assert result.stdout == (await api.client.get("/pd/pd1"))["id"] + "\n"
    assert result.stderr == "protection domain pd1 created\n"
    quiet = await pfvol.run("-q", "pd", "create", "pd2")
    assert (quiet.code, quiet.stderr) == (0, "")


async def test_tables(api: Api, pfvol: Cli) -> None:
    """Goal: piped, a header and a line per object, nothing cut off."""
    await api.make_pool()
    await api.client.post("/sdc/add", name="a-host-with-a-name-of-31-letter")
    await api.client.post("/vol/create", pool_id="pool", name="v1", size="1GiB")
    mapping = {"volume_id": "v1", "sdc_id": "a-host-with-a-name-of-31-letter", "access_mode": "readOnly"}
    await api.client.post("/vol/map", **mapping, iops_limit=9)
    header, line = (await pfvol.text("vol", "list")).splitlines()
    assert header.split() == ["NAME", "ID", "POOL", "STATE", "TYPE", "SIZE", "USED", "MAPPED", "TO"]
    volume = await api.client.get("/vol/v1")
    assert line.split()[:9] == ["v1", volume["id"], "pool", "IN_USE", "thin", "1", "GiB", "0", "B"]
    assert line.endswith("a-host-with-a-name-of-31-letter (readOnly, 9 IOPS)")
    shown = await pfvol.text("vol", "show", "v1", "--chunks")
    assert "Provisioning:" in shown
    assert len([line for line in shown.splitlines() if "(primary)" in line]) == 256
    for words in (["pd", "list"], ["pool", "list"], ["sds", "list"], ["sdc", "list"], ["event", "list"]):
        lines = (await pfvol.text(*words)).splitlines()
        assert len(lines) >= 2, words
        assert "\x1b" not in "".join(lines)
    for words in (["pd", "pd"], ["pool", "pool"], ["sds", "s1"], ["sdc", mapping["sdc_id"]]):
        shown = await pfvol.text(words[0], "show", words[1])
        assert words[1] in shown.splitlines()[0]
        assert "{" not in shown, f"{words} shows JSON"
    assert "Health:" in await pfvol.text("pool", "health", "pool")
    assert "3 up" in await pfvol.text("system", "status")


VOLUME_TITLES = ["NAME", "ID", "POOL", "STATE", "TYPE", "SIZE", "USED", "MAPPED", "TO"]


async def test_empty_tables(pfvol: Cli) -> None:
    assert (await pfvol.text("vol", "list")).split() == VOLUME_TITLES
    assert await pfvol.json("vol", "list") == []


@pytest.mark.parametrize(
    ("words", "exit_code", "code", "said"),
    [
        (["vol", "show", "nothing"], EXIT_NOT_FOUND, "not_found", "nothing"),
        (["vol", "delete", "06ffffff00000009"], EXIT_NOT_FOUND, "not_found", "06ffffff00000009"),
        (["vol", "create", "nopool", "v", "1GiB"], EXIT_NOT_FOUND, "not_found", "nopool"),
        (["vol", "map", "v1", "nohost"], EXIT_NOT_FOUND, "not_found", "nohost"),
        (["vol", "list", "--pool", "nopool"], EXIT_NOT_FOUND, "not_found", "nopool"),
        (["vol", "create", "pool", "v1", "1GiB"], EXIT_CONFLICT, "conflict", "v1"),
        (["vol", "delete", "v1"], EXIT_CONFLICT, "conflict", "host"),
        (["pool", "delete", "pool"], EXIT_CONFLICT, "conflict", "1 volume"),
        (["pd", "delete", "pd"], EXIT_CONFLICT, "conflict", "pd"),
        (["vol", "create", "pool", "v2", "1TiB", "--thick"], EXIT_CAPACITY, "capacity", "pool"),
        (["vol", "extend", "v1", "--to", "1MiB"], None, None, "v1"),
        (["vol", "create", "pool", "bad name", "1GiB"], EXIT_USAGE, "invalid", "bad name"),
        (["vol", "create", "pool", "list", "1GiB"], EXIT_USAGE, "invalid", "list"),
        (["pool", "create", "pd", "p2", "1GiB", "--policy", "five"], EXIT_USAGE, "invalid", "five"),
        (["pool", "set", "pool", "--durability", "never"], EXIT_USAGE, "invalid", "never"),
        (["event", "list", "--type", "PARTY"], EXIT_USAGE, "invalid", "PARTY"),
        (["event", "list", "--since", "noonish"], EXIT_USAGE, "invalid", "since"),
    ],
)
async def test_refusals(
    api: Api, pfvol: Cli, words: list[str], exit_code: int | None, code: str | None, said: str
) -> None:
    """Goal: each class of error has its exit code, one line that names the culprit, and a document with --json."""
    await api.make_pool()
    await api.client.post("/sdc/add", name="host")
    await api.client.post("/vol/create", pool_id="pool", name="v1", size="1GiB")
    await api.client.post("/vol/map", volume_id="v1", sdc_id="host")
    before = api.manager.state
    result = await pfvol.run(*words, json_output=True)
    assert result.code != 0
    assert exit_code in (None, result.code), result.stderr
    error = result.json["error"]
    assert code in (None, error["code"])
    assert said in error["message"]
    assert result.stderr == f"pfvol: {error['message']}\n"
    assert api.manager.state is before


async def test_wrong_token(api: Api, pfvol: Cli) -> None:
    result = await pfvol.run("vol", "list", env={"PFVOL_TOKEN": "wrong"}, json_output=True)
    assert result.code == EXIT_DENIED
    assert result.json["error"]["code"] == "unauthorized"
    assert "PFVOL_TOKEN" in result.stderr


async def test_api_and_token_from_the_environment(api: Api) -> None:
    env = {"PFVOL_API": api.endpoint.url, "PFVOL_TOKEN": TOKEN}
    result = await trio.to_thread.run_sync(invoke, ["pd", "list", "--json"], env)
    assert (result.code, result.json) == (0, [])


async def test_cascade(api: Api, pfvol: Cli) -> None:
    await api.make_pool()
    await api.client.post("/vol/create", pool_id="pool", name="v1", size="1GiB")
    assert (await pfvol.run("pd", "delete", "pd")).code == EXIT_CONFLICT
    assert (await pfvol.run("pd", "delete", "pd", "--cascade")).code == 0
    assert await api.client.get("/vol/list") == []


async def test_system_status_check(api: Api, pfvol: Cli) -> None:
    """Goal: a monitoring script needs only the exit code."""
    await api.make_pool(sds=2)
    await api.client.post("/vol/create", pool_id="pool", name="v1", size="1GiB")
    assert (await pfvol.run("system", "status", "--check")).code == 0
    await api.manager.execute(SetSdsState(sds_id=1, state="DOWN"))
    assert (await pfvol.run("system", "status")).code == 0
    checked = await pfvol.run("system", "status", "--check", json_output=True)
    assert checked.code == EXIT_CONFLICT
    assert checked.json["health"] == "DEGRADED"
    assert "SDS s1 is DOWN" in checked.json["reasons"]


async def test_documents_are_what_rest_answers(api: Api, pfvol: Cli) -> None:
    await api.make_pool()
    await api.client.post("/vol/create", pool_id="pool", name="v1", size="1GiB")
    for words, path in (
        (("pool", "show", "pool"), "/pool/pool"),
        (("pool", "health", "pool"), "/pool/pool/health"),
        (("sds", "list"), "/sds/list"),
        (("vol", "show", "v1"), "/vol/v1"),
        (("system", "status"), "/system/status"),
        (("event", "list"), "/event/list"),
    ):
        assert await pfvol.json(*words) == await api.client.get(path)


async def test_rebuild(api: Api, pfvol: Cli) -> None:
    """Goal: status, cancel and start in words and as JSON; what does not go on by itself ends a watch with code 4."""
    await api.make_pool()
    await pfvol.text("vol", "create", "pool", "v", "1GiB")
    assert "IDLE" in await pfvol.text("rebuild", "status", "pool")
    assert (await pfvol.json("rebuild", "status", "pool", "--watch"))["state"] == "IDLE"
    assert (await pfvol.run("rebuild", "cancel", "pool")).code == EXIT_CONFLICT
    assert (await pfvol.run("rebuild", "status", "none")).code == EXIT_NOT_FOUND
    s1 = next(sds for sds in api.manager.state.sds.values() if sds.name == "s1")
    await api.manager.execute(SetSdsState(sds_id=s1.sds_id, state="DOWN"))
    assert (await pfvol.json("rebuild", "cancel", "pool"))["state"] == "CANCELLED"
    watched = await pfvol.run("rebuild", "status", "pool", "--watch")
    assert (watched.code, "CANCELLED" in watched.stderr) == (EXIT_CONFLICT, True)
    started = await pfvol.run("rebuild", "start", "pool")
    assert (started.code, started.stdout) == (0, "")
    await pfvol.text("pool", "set", "pool", "--rebuild-rate-limit", "20", "--rebuild-delay", "0")
    assert "20" in await pfvol.text("rebuild", "status", "pool")


async def test_an_sds_is_emptied_or_kept(api: Api, pfvol: Cli) -> None:
    await api.make_pool()
    await pfvol.text("vol", "create", "pool", "v", "1GiB")
    removed = await pfvol.run("sds", "remove", "s1")
    assert (removed.code, "is emptied" in removed.stderr) == (0, True)
    assert (await pfvol.json("sds", "show", "s1"))["removing"] is True
    assert (await pfvol.json("sds", "remove", "s1", "--cancel"))["removing"] is False
