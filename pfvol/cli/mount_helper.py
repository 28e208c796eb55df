"""``mount.pfvol`` and ``mount.fuse.pfvol``: what mount(8) runs for ``mount -t pfvol SOURCE DIR -o …`` and for fstab.

SOURCE is a data directory (an absolute path, also as ``pfvol:/path``), an MDM's ``HOST:PORT``, or ``pfvol`` or ``none``
for the default. The syntax is mount(8)'s: ``mount.TYPE SOURCE DIR [-sfnvrw] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]``.
"""

from __future__ import annotations

import getopt
import sys
from collections.abc import Sequence

from pfvol.errors import EXIT_USAGE, Error, InvalidError

DEFAULT_SOURCES = ("", "none", "pfvol")


def arguments_of(words: Sequence[str]) -> list[str] | None:
    """The arguments for ``pfvol`` that do what mount(8) asks; None if it asks to pretend only (``-f``)."""
    try:
        flags, rest = getopt.gnu_getopt(list(words), "sfnvrwo:t:N:")
    except getopt.GetoptError as error:
        raise InvalidError(f"mount helper: {error.msg}") from None
    if len(rest) != 2:
        raise InvalidError("usage: mount.pfvol SOURCE MOUNTPOINT [-o OPTIONS]")
    source, mountpoint = rest
    given = dict(flags)
    options = [value for flag, value in flags if flag == "-o"]
    options += ["ro"] if "-r" in given else []
    if "-f" in given:
        return None
    arguments = ["-v"] if "-v" in given else []
    arguments += _of_source(source.removeprefix("pfvol:"))
    return [*arguments, "mount", *(["-o", ",".join(options)] if options else []), "--", mountpoint]


def _of_source(source: str) -> list[str]:
    if source in DEFAULT_SOURCES:
        return []
    if source.startswith("/"):
        return ["--data-dir", source]
    if ":" in source:
        return ["--mdm", source]
    raise InvalidError(f"source {source!r} is neither a data directory nor an MDM's HOST:PORT nor 'pfvol'")


def main() -> None:
    try:
        arguments = arguments_of(sys.argv[1:])
    except Error as error:
        print(f"mount.pfvol: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    if arguments is None:
        sys.exit(0)
    from pfvol.cli.app import run

    sys.exit(run(arguments))
