"""Mount options: the ``-o`` list of ``pfvol mount`` and of mount(8), parsed. Pure.

Owns the names. Promises that an option is either understood, or one of the generic ones that mount(8) passes to every
helper, or refused by name: a misspelt ``direct`` must not silently give a cached mount.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pfvol.constants import IO_DEADLINE_SECONDS_DEFAULT
from pfvol.errors import InvalidError

IO_DEADLINE_SECONDS_MAX = 24 * 3600.0

# mount(8) hands these over from fstab; they say something to mount(8), systemd or the kernel's VFS, nothing to us.
_GENERIC = frozenset(
    ("rw", "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "_netdev", "nofail", "async")
).union(
    ("sync", "dirsync", "lazytime", "nolazytime", "atime", "noatime", "diratime", "nodiratime", "relatime"),
    ("norelatime", "strictatime", "nostrictatime", "iversion", "noiversion", "silent", "loud", "mand", "nomand"),
)
_VFS = {"nodev": ("dev", False), "dev": ("dev", True), "nosuid": ("suid", False), "suid": ("suid", True)}
_VFS |= {"noexec": ("exec_", False), "exec": ("exec_", True)}


@dataclasses.dataclass(frozen=True, slots=True)
class MountOptions:
    """What a mount was asked to be.

    ``allow_other`` None means the default: yes for root (a device node is there for everybody its mode allows), no
    for others (it needs ``user_allow_other`` in /etc/fuse.conf).
    """

    direct: bool = False
    read_only: bool = False
    allow_other: bool | None = None
    io_deadline_seconds: float = IO_DEADLINE_SECONDS_DEFAULT
    dev: bool = False
    suid: bool = False
    exec_: bool = True
    sdc: str | None = None
    mdm: str | None = None
    data_dir: str | None = None

    def to_text(self) -> str:
        """The list that parses to the same options (those that concern the mount itself)."""
        words = [f"io_deadline={self.io_deadline_seconds:g}"]
        words += ["direct"] if self.direct else []
        words += ["ro"] if self.read_only else []
        if self.allow_other is not None:
            words.append("allow_other" if self.allow_other else "noallow_other")
        words += ["dev"] if self.dev else []
        words += ["suid"] if self.suid else []
        words += [] if self.exec_ else ["noexec"]
        return ",".join(words)


def parse_options(text: str, base: MountOptions | None = None) -> MountOptions:
    """Options from a comma-separated list; a later one wins.

    Raises InvalidError for an option that is unknown or whose value cannot be.
    """
    options = base or MountOptions()
    for word in text.split(","):
        name, has_value, value = word.strip().partition("=")
        if name:
            options = _apply(options, name, value if has_value else None)
    return options


def _apply(options: MountOptions, name: str, value: str | None) -> MountOptions:
    if name in _GENERIC or name.startswith(("x-", "comment")):
        return dataclasses.replace(options, read_only=False) if name == "rw" else options
    if name in ("io_deadline", "sdc", "mdm", "data_dir"):
        if not value:
            raise InvalidError(f"mount option {name!r} needs a value, as in {name}=…")
        if name == "io_deadline":
            return dataclasses.replace(options, io_deadline_seconds=_deadline(value))
        return _changed(options, name, value)
    if value is not None:
        raise InvalidError(f"mount option {name!r} is unknown or takes no value")
    match name:
        case "direct":
            return dataclasses.replace(options, direct=True)
        case "ro":
            return dataclasses.replace(options, read_only=True)
        case "allow_other" | "noallow_other":
            return dataclasses.replace(options, allow_other=name == "allow_other")
        case "default_permissions":
            return options  # Always in force: the kernel checks modes and owners.
        case _ if name in _VFS:
            field, wanted = _VFS[name]
            return _changed(options, field, wanted)
    raise InvalidError(
        f"mount option {name!r} is unknown; known: direct, ro, allow_other, default_permissions, io_deadline=SECONDS, "
        "sdc=NAME, mdm=HOST:PORT, data_dir=DIR"
    )


def _changed(options: MountOptions, field: str, value: Any) -> MountOptions:
    return dataclasses.replace(options, **{field: value})


def _deadline(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= IO_DEADLINE_SECONDS_MAX:
        raise InvalidError(f"io_deadline={text!r} is not a number of seconds between 0 and {IO_DEADLINE_SECONDS_MAX:g}")
    return seconds
