"""The command line without a cluster: help, wrong commands, how the cluster is found, how failures end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdm import faults
from pfvol.cli import sds
from pfvol.cli.app import COMMANDS, hoist_json
from pfvol.errors import EXIT_NOT_FOUND, EXIT_UNREACHABLE, EXIT_USAGE
from tests.support.cli import environment, run_cli

HELP_SECONDS_MAX = 0.3
NOWHERE = "127.0.0.1:1"  # a port that nothing listens on


def test_help_lists_every_command() -> None:
    result = run_cli("--help")
    assert result.code == 0
    for name, (_module, _attribute, text) in COMMANDS.items():
        assert f"  {name} " in result.stdout
        assert text in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    """Goal: each module that is imported on demand can be."""
    result = run_cli(name, "--help")
    assert result.code == 0, result.stderr
    assert result.stdout.startswith(f"Usage: pfvol {name} ")


def test_help_is_quick() -> None:
    """Goal: nothing heavy is imported for it. Processor time, the best of several: others work here too."""

    def seconds() -> float:
        before = os.times()
        assert run_cli("--help").code == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(5)) < HELP_SECONDS_MAX


def test_version() -> None:
    result = run_cli("--version")
    assert result.code == 0
    assert result.stdout.startswith("pfvol ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["volume", "list"], "no command 'volume'; did you mean 'vol'"),
        (["frobnicate"], "no command 'frobnicate'; there are: mount, umount, cluster"),
        (["vol", "lst"], "No such command 'lst'. Did you mean 'list'; see `pfvol vol --help`"),
        (["vol", "show"], "Missing argument 'VOL'; see `pfvol vol show --help`"),
        (["vol", "create", "p", "v"], "Missing argument 'SIZE'"),
        (["vol", "show", "v", "--chunk"], "No such option: --chunk"),
        (["vol", "show", "v", "extra"], "extra"),
        (["vol", "list", "--api", "x"], "--api, which is a global option: it goes before the command"),
        (["vol", "map", "v", "s", "--iops-limit", "-5"], "'--iops-limit'"),
        (["vol", "create", "p", "v", "1GiB", "--thin", "--thick"], "--thin or --thick, not both"),
        (["vol", "extend", "v"], "either ADDITIONAL or --to SIZE"),
        (["vol", "extend", "v", "1GiB", "--to", "2GiB"], "either ADDITIONAL or --to SIZE"),
        (["vol", "show", "../pool/list"], "neither a name"),
        (["vol", "show", ""], "neither a name"),
        (["pool", "set", "p"], "nothing to change"),
        (["sds", "inject", "s"], "nothing to inject: give --error, --delay, --full, --corrupt or --clear"),
        (["sds", "inject", "s", "--error", "read=EIO@1%"], "'read' is no call of a disk: there are pread, pwrite"),
        (["sds", "inject", "s", "--error", "pread=EIO@101%"], "at most 100%"),
        (["sds", "inject", "s", "--delay", "pwrite=20"], "expected CALL=TIME in us, ms or s"),
        (["sds", "inject", "s", "--corrupt", "v/1"], "expected VOLUME/CHUNK:BLOCK"),
        (["cluster", "up", "--sds", "many"], "'--sds'"),
        (["--jason", "vol", "list"], "No such option: --jason"),
        (["sds", "fail", "s", "--duration", "nan"], "more than 0 and at most 2592000 s, not nan"),
        (["sds", "fail", "s", "--duration", "inf"], "more than 0 and at most 2592000 s, not inf"),
        (["sds", "fail", "s", "--duration", "0"], "more than 0 and at most 2592000 s, not 0"),
    ],
)
def test_wrong_command_line(words: list[str], said: str, tmp_path: Path) -> None:
    """Goal: one line that says what is wrong and where the help is; exit 2; nothing on stdout."""
    result = run_cli(*words, env={"PFVOL_API": NOWHERE, "PFVOL_DATA_DIR": str(tmp_path)})
    assert result.code == EXIT_USAGE
    assert result.stdout == ""
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("pfvol: ")


@pytest.mark.parametrize("words", [["vol", "create", "p", "v"], ["vol", "nonsense"], ["vol"], ["nonsense"]])
def test_wrong_command_line_as_json(words: list[str]) -> None:
    result = run_cli("--json", *words)
    assert result.code == EXIT_USAGE
    error = result.json["error"]
    assert error["code"] == "usage"
    assert error["message"]
    assert error["details"]["command"].startswith("pfvol")


@pytest.mark.parametrize(
    "size", ["", "x", "1XiB", "-1GiB", "1e400", "nan", "GiB", "1 2 GiB", "0x10", "999999999999999999999PiB"]
)
def test_sizes_that_do_not_parse(size: str) -> None:
    """Goal: refused before anybody is asked (nobody is there to be asked), and the size is named."""
    result = run_cli("--json", "--api", NOWHERE, "vol", "create", "--", "pool", "vol", size)
    assert result.code == EXIT_USAGE, result.stderr
    assert result.json["error"]["code"] == "invalid"


def test_no_cluster_configured(tmp_path: Path) -> None:
    result = run_cli("vol", "list", data_dir=tmp_path / "none", json_output=True)
    assert result.code == EXIT_UNREACHABLE
    assert result.json["error"]["code"] == "unreachable"
    for way_out in ("pfvol cluster up", "--api", "PFVOL_TOKEN"):
        assert way_out in result.stderr


def test_nobody_answers() -> None:
    result = run_cli("--api", NOWHERE, "vol", "list")
    assert result.code == EXIT_UNREACHABLE
    assert result.stderr == f"pfvol: nobody answers at http://{NOWHERE}; is the cluster up (`pfvol cluster status`)?\n"


def test_api_from_the_environment() -> None:
    result = run_cli("vol", "list", env={"PFVOL_API": f"http://{NOWHERE}/"})
    assert result.code == EXIT_UNREACHABLE
    assert NOWHERE in result.stderr


@pytest.mark.parametrize("address", ["ftp://host", "http://", "not an address/"])
def test_api_address_that_is_none(address: str) -> None:
    result = run_cli("--api", address, "vol", "list")
    assert result.code in (EXIT_USAGE, EXIT_UNREACHABLE)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"api": 5}', "{}"])
def test_damaged_cluster_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "cluster.json").write_text(content)
    result = run_cli("vol", "list", data_dir=tmp_path)
    assert result.code == EXIT_USAGE
    assert str(tmp_path / "cluster.json") in result.stderr


def test_configuration_file_names_the_api(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('[cluster]\nmdm = "127.0.0.1:9"\n[mdm]\napi_port = 1\n')
    result = run_cli("--config", config, "vol", "list", data_dir=tmp_path)
    assert result.code == EXIT_UNREACHABLE
    assert f"http://{NOWHERE}" in result.stderr


def test_configuration_file_missing(tmp_path: Path) -> None:
    result = run_cli("--config", tmp_path / "none.toml", "vol", "list", data_dir=tmp_path)
    assert result.code == EXIT_USAGE
    assert "none.toml" in result.stderr


def test_cluster_commands_without_a_cluster(tmp_path: Path) -> None:
    for command in ("status", "down", "restart"):
        result = run_cli("cluster", command, data_dir=tmp_path / "none", json_output=True)
        assert result.code == EXIT_NOT_FOUND, result.stderr
        assert result.json["error"]["code"] == "not_found"


def test_cluster_data_dir_after_the_command(tmp_path: Path) -> None:
    result = run_cli("cluster", "status", "--data-dir", tmp_path / "other", data_dir=tmp_path / "none")
    assert str(tmp_path / "other") in result.stderr


@pytest.mark.parametrize(
    ("args", "hoisted"),
    [
        (["vol", "list", "--json"], ["--json", "vol", "list"]),
        (["vol", "--json", "list"], ["--json", "vol", "list"]),
        (["--json", "vol", "list", "--json"], ["--json", "vol", "list"]),
        (["vol", "show", "--", "--json"], ["vol", "show", "--", "--json"]),
        (["vol", "list"], ["vol", "list"]),
    ],
)
def test_json_anywhere(args: list[str], hoisted: list[str]) -> None:
    assert hoist_json(args) == hoisted


def test_reader_that_goes_away() -> None:
    """Goal: `pfvol --help | head -1` is quiet."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pfvol.cli", "--version"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            check=False,
        )
    finally:
        os.close(write)
    assert done.stderr == ""


def test_error_document_is_the_only_document(tmp_path: Path) -> None:
    result = run_cli("vol", "list", "--json", data_dir=tmp_path)
    assert list(json.loads(result.stdout)) == ["error"]
    assert list(result.json["error"]) == ["code", "message", "details"]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("node", "run", "--name", "n1", "--capabilities", "sds", "--config", "/nonexistent"), "config"),
        (("--mdm", NOWHERE, "mount", "--foreground", "."), "config"),  # no secret to speak to it with
    ],
)
def test_a_process_in_the_foreground_tells_its_failure_in_json_too(
    tmp_path: Path, command: tuple[str, ...], code: str
) -> None:
    """Goal: the commands that become another program keep the promise of ``--json``."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    words = [str(mountpoint) if word == "." else word for word in command]
    result = run_cli(*words, data_dir=tmp_path / "data", json_output=True)
    assert result.json["error"]["code"] == code
    assert result.json["error"]["message"] in result.stderr
    assert result.code == EXIT_USAGE


def test_the_end_of_a_failure_is_waited_for_longer_than_the_mdm_does() -> None:
    assert sds.RECOVER_TIMEOUT_SECONDS > faults.RECOVER_TIMEOUT_SECONDS + faults.BACK_SECONDS_MAX
