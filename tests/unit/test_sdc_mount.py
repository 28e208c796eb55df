"""The mount table, mount records, notifications and mount(8)'s syntax, without mounting anything."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from pfvol.cli.mount_helper import arguments_of
from pfvol.errors import ConfigError, ConflictError, InvalidError, NotFoundError
from pfvol.ids import is_name
from pfvol.sdc import launch, mount, notify, records

MOUNTINFO = r"""22 1 0:20 / / rw,relatime - ext4 /dev/vda1 rw
44 22 0:39 / /mnt/a\040b\134c rw,nosuid,nodev - fuse.pfvol pfvol:/var/lib/pfvol rw,user_id=0
45 22 0:40 / /mnt/x rw shared:5 master:2 - tmpfs tmpfs rw
46 45 0:41 / /mnt/x rw - fuse.pfvol pfvol:h:1 rw
"""


def test_the_mount_table_is_read_with_its_escapes() -> None:
    entries = mount.mount_table(MOUNTINFO)
    assert [entry.mountpoint for entry in entries] == ["/", "/mnt/a b\\c", "/mnt/x", "/mnt/x"]
    assert entries[-1] == mount.MountEntry("/mnt/x", "fuse.pfvol", "0:41")


def test_a_mountpoint_that_is_missing_or_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        mount.check_mountpoint(str(tmp_path / "missing"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a directory"):
        mount.check_mountpoint(str(tmp_path / "file"))
    mount.check_mountpoint(str(tmp_path))


def test_a_link_to_a_mountpoint_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert mount.resolve(str(tmp_path / "link")) == str(tmp_path / "there")


def test_users_of_a_directory_are_named(tmp_path: Path) -> None:
    with (tmp_path / "held").open("w"):
        users = mount.users_of(str(tmp_path))
    assert [f"(pid {os.getpid()}, has held open)" in user for user in users] == [True]
    assert mount.users_of(str(tmp_path)) == []


def test_umount_of_what_is_not_mounted_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing is mounted"):
        launch.stop(tmp_path, str(tmp_path))


def test_umount_leaves_other_filesystems_alone() -> None:
    with pytest.raises(InvalidError, match="no pfvol mount but proc"):
        launch.stop(Path("/nowhere"), "/proc")


def test_a_record_is_believed_while_its_process_lives(tmp_path: Path) -> None:
    mountpoint = _own_words()[0]  # A daemon is known by its mountpoint among its arguments.
    records.prepare(tmp_path)
    records.write(tmp_path, mountpoint, "sdc1")
    found = records.find(tmp_path, mountpoint)
    assert found is not None
    assert (found.pid, found.sdc) == (os.getpid(), "sdc1")
    with pytest.raises(ConflictError, match="sdc1 has a mount already"):
        launch.check_free(tmp_path, "sdc1")
    launch.check_free(tmp_path, "sdc2")
    path = records.file_of(tmp_path, mountpoint, "json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"start_ticks": 1}))
    assert records.find(tmp_path, mountpoint) is None
    assert records.live(tmp_path) == []


def _own_words() -> list[str]:
    return Path("/proc/self/cmdline").read_bytes().decode().split("\0")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"mountpoint": 1}', '{"mountpoint":"/","sdc":"a","pid":"x"}'])
def test_a_broken_record_is_no_record(tmp_path: Path, text: str) -> None:
    records.prepare(tmp_path)
    records.file_of(tmp_path, "/m", "json").write_text(text)
    assert records.live(tmp_path) == []


def test_record_files_of_long_and_odd_paths_do_not_collide(tmp_path: Path) -> None:
    paths = ["/a/b", "/a%2Fb", "/" + "x" * 4000, "/" + "x" * 4001, "/a b", "/ä"]
    files = {records.file_of(tmp_path, path, "json").name for path in paths}
    assert len(files) == len(paths)
    assert all(len(name) < 255 and "/" not in name for name in files)


def test_notifications_are_laid_out_as_the_kernel_reads_them() -> None:
    gone = notify.deleted(1, 257, b"vol1")
    assert struct.unpack("=IiQ", gone[:16]) == (len(gone), 6, 0)
    assert struct.unpack("=QQII", gone[16:40]) == (1, 257, 4, 0)
    assert gone[40:] == b"vol1\0"
    forget = notify.forget_attributes(257)
    assert struct.unpack("=IiQQqq", forget) == (40, 2, 0, 257, -1, 0)
    grown = notify.grown(257, 8192)
    assert struct.unpack("=IiQQQII", grown[:40]) == (41, 4, 0, 257, 8191, 1, 0)


def test_mount8_syntax_becomes_ours() -> None:
    words = [
        "pfvol:/var/lib/x",
        "/mnt/a",
        "-n",
        "-v",
        "-s",
        "-o",
        "rw,noauto",
        "-r",
        "-t",
        "fuse.pfvol",
        "-o",
        "direct",
    ]
    expected = ["-v", "--data-dir", "/var/lib/x", "mount", "-o", "rw,noauto,direct,ro", "--", "/mnt/a"]
    assert arguments_of(words) == expected
    assert arguments_of(["host:8010", "/m"]) == ["--mdm", "host:8010", "mount", "--", "/m"]
    assert arguments_of(["pfvol", "/m", "-o", "ro"]) == ["mount", "-o", "ro", "--", "/m"]
    assert arguments_of(["-f", "none", "/m"]) is None


@pytest.mark.parametrize("words", [[], ["a"], ["a", "b", "c"], ["pfvol", "/m", "-Z"], ["strange", "/m"]])
def test_what_is_not_mount8_syntax_is_refused(words: list[str]) -> None:
    with pytest.raises(InvalidError):
        arguments_of(words)


@pytest.mark.parametrize("hostname", ["host", "a.b.c", "-x", "ü", "0123456789abcdef", "x" * 64, "", "a b"])
def test_every_machine_name_gives_an_sdc_name(hostname: str) -> None:
    assert is_name(launch.default_sdc_name(hostname))
