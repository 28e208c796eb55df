"""A disk that loses power: what may be on it after any prefix of recorded operations.

The rules. What was written to a file before a sync of it began is on the disk once that sync has ended. Of everything
else each 512-byte sector has, independently, its last durable content or any that was written to it since; the same
goes for holes and sizes. Names (made, renamed, exchanged, removed) are their directory's content: its sync makes them
durable, the others are there up to any one of them, in order.

``in_place``: on a file system that overwrites where a block is, pages that were written out and waited for
(sync_file_range) are with the disk, if their places were made durable by a sync of the file before. The next sync of a
file of the same device has the disk empty its cache, and they are durable. Without ``in_place`` that call promises
nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from tests.crashstates.recording import (
    CREATE,
    EXCHANGE,
    MKDIR,
    PAGES_BEGIN,
    PAGES_END,
    PUNCH,
    RENAME,
    ROOT,
    SIZE,
    SYNC_BEGIN,
    SYNC_END,
    UNLINK,
    WRITE,
    Operation,
)

SECTOR: Final = 512
PAGE: Final = 4096
ZEROS: Final = bytes(PAGE)
MODES: Final = ("none", "all", "sectors", "pages", "few", "most", "prefix")

Pages = dict[int, bytes]


@dataclass(slots=True)
class Change:
    """Not durable yet: a page's content, of which the bytes [first, last) were written."""

    at: int
    page: int
    first: int
    last: int
    content: bytes


@dataclass(slots=True)
class File:
    """An inode. ``cache`` is what a reader sees, ``durable`` what is on the disk for certain; no page: zeros."""

    number: int
    cache: Pages = field(default_factory=dict)
    durable: Pages = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    placed: set[int] = field(default_factory=set)
    with_disk: int = -1  # what was written before this is in the disk's cache
    size: int = 0
    durable_size: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)  # not durable yet: when, size
    directory: int = 0

    def resize(self, at: int, size: int) -> None:
        if size != self.size:
            self.size = size
            self.sizes.append((at, size))

    def write(self, at: int, offset: int, data: bytes) -> None:
        self.resize(at, max(self.size, offset + len(data)))
        done = 0
        while done < len(data):
            page, first = divmod(offset + done, PAGE)
            last = min(PAGE, first + len(data) - done)
            part = data[done : done + last - first]
            old = self.cache.get(page, ZEROS)
            content = part if len(part) == PAGE else old[:first] + part + old[last:]
            self.cache[page] = content
            self.pending.append(Change(at, page, first, last, content))
            done += last - first

    def punch(self, at: int, offset: int, length: int) -> None:
        for page in sorted(self.cache):
            if offset <= page * PAGE < offset + length:
                del self.cache[page]
                self.pending.append(Change(at, page, 0, PAGE, ZEROS))

    def settle(self, before: int, pages: set[int] | None = None) -> None:
        """What was written before ``before`` (to ``pages``, when given) is durable."""
        left = []
        if pages is None:
            for at, size in self.sizes:
                if at < before:
                    self.durable_size = size
            self.sizes = [entry for entry in self.sizes if entry[0] >= before]
        for change in self.pending:
            if change.at >= before or (pages is not None and change.page not in pages):
                left.append(change)
                continue
            old = self.durable.get(change.page, ZEROS)
            self.durable[change.page] = (
                old[: change.first] + change.content[change.first : change.last] + old[change.last :]
            )
            if pages is None:
                self.placed.add(change.page)
        self.pending = left

    def after_power_loss(self, rng: random.Random, mode: str) -> tuple[Pages, int]:
        sizes = [self.durable_size, *(size for _, size in self.sizes)]
        size = {"none": sizes[0], "all": sizes[-1]}.get(mode)
        return self._pages(rng, mode), rng.choice(sizes) if size is None else size

    def _pages(self, rng: random.Random, mode: str) -> Pages:
        if mode == "none" or not self.pending:
            return self.durable
        if mode == "all":
            return self.cache
        changes = self.pending
        if mode == "prefix":
            changes = changes[: rng.randrange(len(changes) + 1)]
            mode = "all"
        pages = dict(self.durable)
        by_page: dict[int, list[Change]] = {}
        for change in changes:
            by_page.setdefault(change.page, []).append(change)
        chosen = set(rng.sample(sorted(by_page), min(len(by_page), rng.randrange(1, 3))))
        for page, versions in by_page.items():
            if (mode == "few" and page not in chosen) or (mode == "most" and page in chosen):
                continue
            if mode == "pages":
                versions = versions[: rng.randrange(len(versions) + 1)]
            torn = mode == "sectors" or (mode == "few" and rng.random() < 0.5)
            pages[page] = _layered(rng, self.durable.get(page, ZEROS), versions, torn)
        return pages


def _layered(rng: random.Random, old: bytes, versions: Iterable[Change], torn: bool) -> bytes:
    """One write over the other; torn: a sector misses any of them, but what is under the last that it has does not
    show."""
    content = bytearray(old)
    for change in versions:
        if not torn:
            content[change.first : change.last] = change.content[change.first : change.last]
            continue
        for sector in range(change.first // SECTOR, -(-change.last // SECTOR)):
            if rng.random() < 0.5:  # the whole sector as it was in the cache, also when less of it was written
                content[sector * SECTOR : (sector + 1) * SECTOR] = change.content[
                    sector * SECTOR : (sector + 1) * SECTOR
                ]
    return bytes(content)


@dataclass(slots=True)
class Directory:
    """Names and what they name; ``pending`` has (when, names after it)."""

    cache: dict[str, int] = field(default_factory=dict)
    durable: dict[str, int] = field(default_factory=dict)
    pending: list[tuple[int, dict[str, int]]] = field(default_factory=list)

    def change(self, at: int, **_: object) -> None:
        self.pending.append((at, dict(self.cache)))

    def settle(self, before: int) -> None:
        for at, names in self.pending:
            if at < before:
                self.durable = names
        self.pending = [entry for entry in self.pending if entry[0] >= before]


class Disk:
    """Takes operations one by one; ``state`` is what a loss of power now may leave: files by path."""

    def __init__(self, in_place: bool = True) -> None:
        self.in_place = in_place
        self.nodes: dict[int, File | Directory] = {ROOT: Directory()}
        self.inodes: dict[int, int] = {ROOT: ROOT}  # of the host to ours: theirs are used again
        self.paths: dict[str, int] = {"": ROOT}
        self.at = 0
        self._begun: dict[tuple[int, int], list[tuple[int, list[tuple[File, int]]]]] = {}

    @classmethod
    def of(cls, state: dict[str, tuple[Pages, int]], inodes: dict[str, int], in_place: bool = True) -> Disk:
        """One on which ``state`` is durable; ``inodes`` has the host's numbers of files and directories."""
        disk = cls(in_place)
        for path in sorted(inodes, key=lambda one: one.count("/")):
            disk._make(path, inodes[path], path not in state)
            if path in state:
                node = disk.nodes[disk.inodes[inodes[path]]]
                assert isinstance(node, File)
                node.durable, node.cache = dict(state[path][0]), dict(state[path][0])
                node.size = node.durable_size = state[path][1]
                node.placed = set(node.durable)
        for node in disk.nodes.values():
            if isinstance(node, Directory):
                node.durable, node.pending = dict(node.cache), []
        return disk

    def _make(self, path: str, inode: int, directory: bool) -> None:
        number = len(self.nodes)
        parent, name = self._parent(path)
        self.nodes[number] = Directory() if directory else File(number, directory=self.paths[path.rpartition("/")[0]])
        self.inodes[inode] = number
        self.paths[path] = number
        parent.cache[name] = number
        parent.change(self.at)

    def _parent(self, path: str) -> tuple[Directory, str]:
        head, _, name = path.rpartition("/")
        node = self.nodes[self.paths[head]]
        assert isinstance(node, Directory)
        return node, name

    def file(self, operation: Operation) -> File | Directory | None:
        """What the operation is about; None for the root or what is not ours."""
        return self.nodes.get(self.inodes.get(operation.file, ROOT - 1))

    def apply(self, operation: Operation) -> None:
        self.at += 1
        kind = operation.kind
        if kind in (CREATE, MKDIR):
            self._make(operation.data.decode(), operation.file, kind == MKDIR)
        elif kind in (RENAME, EXCHANGE, UNLINK):
            self._rename(kind, *operation.data.decode().split("\n"))
        node = self.file(operation)
        if isinstance(node, File):
            if kind == WRITE:
                node.write(self.at, operation.offset, operation.data)
            elif kind == PUNCH:
                node.punch(self.at, operation.offset, operation.length)
            elif kind == SIZE:
                assert operation.length >= node.size, "a file that shrinks is not modelled"
                node.resize(self.at, operation.length)
        if kind in (SYNC_BEGIN, PAGES_BEGIN) and node is not None:
            with_disk = [
                (one, one.with_disk)
                for one in self.nodes.values()
                if isinstance(one, File) and isinstance(node, File) and one.with_disk > 0
                if one.directory == node.directory
            ]
            self._begun.setdefault((kind, operation.file), []).append((self.at, with_disk))
        elif kind in (SYNC_END, PAGES_END) and node is not None:
            self._ended(kind, operation, node)

    def _ended(self, kind: int, operation: Operation, node: File | Directory) -> None:
        begun = self._begun[kind - 1, operation.file]
        before, with_disk = begun.pop(0)
        if kind == PAGES_END:
            if self.in_place and isinstance(node, File):
                node.with_disk = max(node.with_disk, before)
            return
        node.settle(before)
        if isinstance(node, File):
            for file, reached in with_disk:
                file.settle(reached, file.placed)

    def _rename(self, kind: int, source: str, target: str = "") -> None:
        parent, name = self._parent(source)
        number = parent.cache[name]
        if kind == UNLINK:
            del parent.cache[name]
        else:
            other, new = self._parent(target)
            assert parent is other, "a rename between directories is not modelled"
            replaced = parent.cache.get(new)
            parent.cache[new] = number
            if kind == EXCHANGE:
                assert replaced is not None
                parent.cache[name] = replaced
            else:
                del parent.cache[name]
        self.paths = {"": ROOT}
        self._walk("", ROOT)
        parent.change(self.at)

    def _walk(self, path: str, number: int) -> None:
        node = self.nodes[number]
        if isinstance(node, Directory):
            for name, child in node.cache.items():
                below = f"{path}/{name}" if path else name
                self.paths[below] = child
                self._walk(below, child)

    def state(self, rng: random.Random, mode: str | None = None, below: str = "") -> dict[str, tuple[Pages, int]]:
        """Files by path: (pages, size), those below a directory only, when it is given (with its slash). ``mode`` is
        one of MODES for all files; None: another for each, at random."""
        out: dict[str, tuple[Pages, int]] = {}
        self._collect("", ROOT, rng, mode, out, below)
        return out

    def _collect(
        self,
        path: str,
        number: int,
        rng: random.Random,
        mode: str | None,
        out: dict[str, tuple[Pages, int]],
        below: str,
    ) -> None:
        node = self.nodes[number]
        if not f"{path}/".startswith(below) and not below.startswith(f"{path}/" if path else ""):
            return
        chosen = mode or rng.choice(MODES)
        if isinstance(node, File):
            out[path] = node.after_power_loss(rng, chosen)
            return
        choices = [node.durable, *(names for _, names in node.pending)]
        names = {"none": choices[0], "all": choices[-1]}.get(chosen) or rng.choice(choices)
        for name, child in names.items():
            self._collect(f"{path}/{name}" if path else name, child, rng, mode, out, below)

    @property
    def undecided(self) -> bool:
        """Something is not durable yet."""
        return any(node.pending or (isinstance(node, File) and node.sizes) for node in self.nodes.values())
