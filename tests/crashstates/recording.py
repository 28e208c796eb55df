"""What a process does to the files below one directory, as a list: the Python side of recorder.c.

``preloaded()`` starts the program again with the recorder preloaded. Then ``with Recording(directory) as recording``
records what this process does to files that it opens from then on, ``recording.mark`` puts an entry of its own into the
stream, and ``recording.operations`` has it all afterwards, with paths relative to the directory. Nothing of the product
knows of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

MARK, CREATE, MKDIR, WRITE, PUNCH, SIZE, SYNC_BEGIN, SYNC_END = range(1, 9)
PAGES_BEGIN, PAGES_END, RENAME, EXCHANGE, UNLINK, OTHER = range(9, 15)
ROOT: Final = -1  # the file number of the recorded directory itself
EXT4: Final = 0xEF53
XFS: Final = 0x58465342
_RECORD: Final = struct.Struct("<IIQQQ")
_LIBRARY: Final = "PFVOL_TEST_RECORDER"


@dataclass(slots=True)
class Operation:
    """One of them. ``file`` is the inode's number, ``mark`` what ``Recording.mark`` was given."""

    kind: int
    file: int
    offset: int
    length: int
    data: bytes
    mark: Any = None


def preloaded() -> None:
    """Returns when the recorder is in this process; else builds it and starts this program again with it."""
    if _LIBRARY in os.environ:
        return
    directory = tempfile.mkdtemp(prefix="pfvol-recorder-")
    library = Path(directory) / "recorder.so"
    source = Path(__file__).with_name("recorder.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), _LIBRARY: str(library)}
    os.execve(sys.executable, [sys.executable, "-m", sys.modules["__main__"].__spec__.name, *sys.argv[1:]], environment)
    # type: ignore[union-attr]


def cleanup() -> None:
    """Takes the library's file away; at the end of the program."""
    library = Path(os.environ[_LIBRARY])
    library.unlink(missing_ok=True)
    library.parent.rmdir()


class Recording:
    """Records while it is entered. ``sync_delay_us``: how long a sync takes at most; ``file_system``: what fstatfs
    says."""

    def __init__(self, directory: Path, *, sync_delay_us: int = 0, seed: int = 0, file_system: int = EXT4) -> None:
        self.directory = directory
        self.operations: list[Operation] = []
        self._library = ctypes.CDLL(os.environ[_LIBRARY])
        self._library.recorder_stop.restype = ctypes.c_void_p
        self._arguments = (os.fsencode(directory), sync_delay_us, seed & 0xFFFFFFFF, ctypes.c_long(file_system))

    def __enter__(self) -> Recording:
        self._root = self.directory.stat().st_ino
        self._library.recorder_start(*self._arguments)
        return self

    def mark(self, what: str, **fields: Any) -> None:
        text = json.dumps([what, fields]).encode()
        self._library.recorder_mark(text, ctypes.c_size_t(len(text)))

    def __exit__(self, *_: object) -> None:
        size = ctypes.c_size_t()
        at = self._library.recorder_stop(ctypes.byref(size))
        log = ctypes.string_at(at, size.value) if size.value else b""
        self.operations = list(self._parse(log))

    def _parse(self, log: bytes) -> Any:
        at, prefix = 0, os.fsencode(self.directory) + b"/"
        while at < len(log):
            kind, size, file, offset, length = _RECORD.unpack_from(log, at)
            data = log[at + _RECORD.size : at + _RECORD.size + size]
            at += _RECORD.size + size
            if kind == OTHER:
                raise AssertionError(f"a call that the recorder does not understand: {data.decode()}")
            if kind in (CREATE, MKDIR, UNLINK, RENAME, EXCHANGE):
                data = b"\n".join(name.removeprefix(prefix) for name in data.split(b"\n"))
            yield Operation(
                kind,
                ROOT if file == self._root else file,
                offset,
                length,
                data,
                json.loads(data) if kind == MARK else None,
            )
