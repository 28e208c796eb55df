"""Mount options: each understood, passed over or refused, never guessed."""

from __future__ import annotations

import pytest

from pfvol.errors import InvalidError
from pfvol.sdc.options import MountOptions, parse_options


def test_nothing_given_is_the_default() -> None:
    assert parse_options("") == MountOptions()
    assert parse_options(",,") == MountOptions()


def test_every_option_of_ours_is_understood() -> None:
    options = parse_options("direct,ro,allow_other,default_permissions,io_deadline=2.5,sdc=a,mdm=h:1,data_dir=/d")
    assert options == MountOptions(
        direct=True, read_only=True, allow_other=True, io_deadline_seconds=2.5, sdc="a", mdm="h:1", data_dir="/d"
    )


def test_the_later_option_wins() -> None:
    assert parse_options("ro,rw").read_only is False
    assert parse_options("rw,ro").read_only is True
    assert parse_options("suid,nosuid,dev,noexec") == MountOptions(dev=True, exec_=False)


@pytest.mark.parametrize(
    "text", ["rw,noauto,user,_netdev,nofail,x-systemd.automount,x-initrd.mount,comment=a", "defaults,relatime,async"]
)
def test_what_mount8_passes_to_everybody_changes_nothing(text: str) -> None:
    assert parse_options(text) == MountOptions()


@pytest.mark.parametrize("word", ["dirct", "direct=1", "ro=yes", "size=5", "io_deadline", "io_deadline=", "sdc="])
def test_what_is_not_understood_is_refused_by_name(word: str) -> None:
    with pytest.raises(InvalidError, match=word.partition("=")[0]):
        parse_options(f"ro,{word}")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e9", "x"])
def test_a_deadline_that_cannot_be_is_refused(value: str) -> None:
    with pytest.raises(InvalidError, match="io_deadline"):
        parse_options(f"io_deadline={value}")


@pytest.mark.parametrize("text", ["", "direct,ro", "noallow_other,io_deadline=0.5", "allow_other,dev,suid,noexec"])
def test_the_daemon_gets_what_was_parsed(text: str) -> None:
    options = parse_options(text)
    assert parse_options(options.to_text()) == options
