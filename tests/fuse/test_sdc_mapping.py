"""Volumes come, go, grow and change their access under a live mount; several mounts share one."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import poll_until

MIB = 1024**2
MakeVolume = Callable[..., str]
Mounted = Callable[..., Any]


def write_directly(path: Path, offset: int, data: bytes) -> None:
    with mmap.mmap(-1, len(data)) as buffer:
        buffer.write(data)
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
        try:
            assert os.pwrite(fd, buffer, offset) == len(data)
        finally:
            os.close(fd)


def test_volumes_appear_and_vanish_live(cluster: Any, mounted: Mounted, new_volume: MakeVolume) -> None:
    mount = mounted()
    assert os.listdir(mount.path) == []
    first, second = new_volume(), new_volume()
    for name in (first, second):
        assert not mount.volume(name).exists()
        cluster.cli("vol", "map", name, mount.sdc)
        poll_until(mount.volume(name).exists, what=f"{name} in the mount")
    assert set(os.listdir(mount.path)) == {first, second}
    cluster.cli("vol", "unmap", first, mount.sdc)
    poll_until(lambda: not mount.volume(first).exists(), what=f"{first} gone")
    assert os.listdir(mount.path) == [second]


def test_an_open_file_gets_enodev_when_unmapped_and_the_name_comes_back_fresh(
    cluster: Any, mounted: Mounted, new_volume: MakeVolume
) -> None:
    name = new_volume()
    mount = mounted(name)
    path = mount.volume(name)
    path.write_bytes(b"first")
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        cluster.cli("vol", "unmap", name, mount.sdc)
        poll_until(lambda: not path.exists(), what="the name gone")
        for attempt in (lambda: os.preadv(fd, [mmap.mmap(-1, 4096)], 0), lambda: os.fsync(fd)):
            with pytest.raises(OSError, match=r".*") as raised:
                attempt()
            assert raised.value.errno == errno.ENODEV
        cluster.cli("vol", "map", name, mount.sdc)
        poll_until(path.exists, what="the name again")
        with path.open("rb") as file:
            assert file.read(5) == b"first"
    finally:
        with contextlib.suppress(OSError):  # The kernel holds the old file for bad since the new one is there.
            os.close(fd)


@pytest.mark.parametrize("options", [(), ("direct",), ("ro",)])
def test_an_extension_shows_at_once_also_in_open_files(
    cluster: Any, mounted: Mounted, new_volume: MakeVolume, options: tuple[str, ...]
) -> None:
    name = new_volume("16MiB")
    mount = mounted(name, options=options)
    path = mount.volume(name)
    with path.open("rb" if "ro" in options else "r+b", buffering=0) as file:
        assert os.fstat(file.fileno()).st_size == 16 * MIB
        cluster.cli("vol", "extend", name, "--to", "24MiB")
        poll_until(lambda: path.stat().st_size == 24 * MIB, what="the new size")
        assert file.seek(0, os.SEEK_END) == 24 * MIB
        if "ro" not in options:
            assert os.pwrite(file.fileno(), b"tail" * 1024, 24 * MIB - 4096) == 4096
            os.fsync(file.fileno())
        tail = os.pread(file.fileno(), 8192, 24 * MIB - 4096)
        assert tail == (bytes(4096) if "ro" in options else b"tail" * 1024)


def test_an_extension_of_a_read_only_mapping_shows(cluster: Any, mounted: Mounted, new_volume: MakeVolume) -> None:
    name = new_volume("16MiB")
    mount = mounted()
    cluster.cli("vol", "map", name, mount.sdc, "--ro")
    path = mount.volume(name)
    poll_until(path.exists, what="the volume")
    assert path.stat().st_size == 16 * MIB
    cluster.cli("vol", "extend", name, "--to", "20MiB")
    poll_until(lambda: path.stat().st_size == 20 * MIB, what="the new size")
    with path.open("rb") as file:
        file.seek(20 * MIB - 10)
        assert file.read() == bytes(10)


def test_a_read_only_mapping_refuses_writers(cluster: Any, mounted: Mounted, new_volume: MakeVolume) -> None:
    name = new_volume()
    writer = mounted(name)
    reader = mounted()
    cluster.cli("vol", "map", name, reader.sdc, "--ro")
    path = reader.volume(name)
    poll_until(path.exists, what="the volume")
    assert path.stat().st_mode & 0o777 == 0o444
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_DIRECT, os.O_RDWR | os.O_TRUNC):
        with pytest.raises(OSError, match=r".*") as raised:
            os.open(path, flags)
        assert raised.value.errno in (errno.EROFS, errno.EACCES)
    write_directly(writer.volume(name), 0, b"r" * 4096)
    with path.open("rb") as file:
        assert file.read(4096) == b"r" * 4096


def test_a_read_only_mount_refuses_writers(mounted: Mounted, new_volume: MakeVolume) -> None:
    name = new_volume()
    mount = mounted(name, options=("ro",))
    with pytest.raises(OSError, match=r".*") as raised:
        mount.volume(name).open("r+b")
    assert raised.value.errno == errno.EROFS
    with mount.volume(name).open("rb") as file:
        assert file.read(10) == bytes(10)


def test_two_direct_mounts_see_each_others_writes_at_once(mounted: Mounted, new_volume: MakeVolume) -> None:
    name = new_volume()
    one, other = mounted(name, options=("direct",)), mounted(name, options=("direct",))
    paths = [one.volume(name), other.volume(name)]
    for round_ in range(20):
        data = bytes([round_ + 1]) * 5000
        offset = round_ * 3333
        with paths[round_ % 2].open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), data, offset)
        with paths[1 - round_ % 2].open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 5000, offset) == data


def test_what_was_not_synced_is_there_after_umount_and_mount(
    cluster: Any, mounted: Mounted, new_volume: MakeVolume
) -> None:
    name = new_volume()
    mount = mounted(name)
    data = os.urandom(9 * MIB + 17)
    with mount.volume(name).open("r+b") as file:
        file.write(data)
    mount.unmount()
    again = cluster.mount(sdc=mount.sdc)
    with again.volume(name).open("rb") as file:
        assert file.read(len(data)) == data
