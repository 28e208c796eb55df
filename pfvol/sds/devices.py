"""The devices of an SDS: made when the MDM says so, opened together, under one incarnation.

Owns ``<node directory>/sds.json`` (who this SDS is, its data port, the devices it has) and the devices' lifecycle
outside the engine. Assumes that one process works on a node directory (each device is locked). Promises: a device is
listed in sds.json only once it was made whole, and a listed one is never made again, so that a device that is lost
shows as lost and not as empty; what is wrong with a device is said with its path; the others are opened all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from datapath.blockfile import FILES, BlockDevice
from pfvol.constants import CHUNK_SIZE_BYTES
from pfvol.errors import ConfigError, ConflictError, ProtocolError, VersionError
from pfvol.log import get_logger

STATE_FILE: Final = "sds.json"
STATE_FORMAT: Final = 1
DEVICES_MAX: Final = 1024
PROBE_BYTES: Final = 4096
WORKING_MAX: Final = 4  # devices that are made or recovered at a time
_SUMMARY: Final = ("clean", "used", "free", "unknown_blocks", "records")
_ROT: Final = ("superblock_restored", "journal_damaged", "mended", "lost_reasons", "unsure")


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device as the MDM tells of it, with its directory resolved."""

    index: int
    path: str
    slots: int


@dataclass(frozen=True, slots=True)
class SdsState:
    """What an SDS remembers of itself across restarts."""

    cluster_id: bytes | None = None
    sds_id: int | None = None
    data_port: int = 0
    devices: tuple[DeviceSpec, ...] = ()


def load_state(directory: Path) -> SdsState:
    """The state of the SDS in ``directory``; a fresh one when there is none. ConfigError, VersionError."""
    path = directory / STATE_FILE
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return SdsState()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        if document["format"] != STATE_FORMAT:
            raise VersionError(f"{path} has format {document['format']!r}; this version of pfvol reads {STATE_FORMAT}")
        devices = [DeviceSpec(int(one["index"]), str(one["path"]), int(one["slots"])) for one in document["devices"]]
        cluster_id = document["cluster_id"]
        return SdsState(
            bytes.fromhex(cluster_id) if cluster_id is not None else None,
            int(document["sds_id"]) if document["sds_id"] is not None else None,
            int(document["data_port"]),
            tuple(devices),
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}): restore it from a copy") from None


def save_state(directory: Path, state: SdsState) -> None:
    """Replaces the state file durably: after a crash the old one or the new one is there, whole."""
    document = {
        "format": STATE_FORMAT,
        "cluster_id": state.cluster_id.hex() if state.cluster_id is not None else None,
        "sds_id": state.sds_id,
        "data_port": state.data_port,
        "devices": [{"index": one.index, "path": one.path, "slots": one.slots} for one in state.devices],
    }
    replace_document(directory / STATE_FILE, document)


def replace_document(path: Path, document: dict[str, Any]) -> None:
    """Durably: after a crash the old one or the new one is there, whole. ConfigError when it cannot be written."""
    directory, partial = path.parent, path.with_name(path.name + ".new")
    try:
        for above in [one for one in (directory, *directory.parents) if not one.exists()][::-1]:
            above.mkdir(exist_ok=True, mode=0o700)
            _sync_directory(above.parent)
        with open(partial, "w") as file:
            json.dump(document, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_directory(directory)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _probe(path: Path, device_id: bytes) -> None:
    """OSError, ValueError unless the disk below a device in use still has it, reads, and keeps what is written."""
    if device_id not in (path / "superblock").read_bytes():
        raise ValueError(f"{path}: is not the device that was there")
    for name in FILES:
        with open(path / name, "r+b") as file:
            file.read(PROBE_BYTES)
            os.fsync(file.fileno())
    probe = path / "probe"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def parse_specs(directory: Path, body: Any) -> list[DeviceSpec]:
    """The devices that the MDM tells of; ProtocolError when they are none."""
    try:
        specs = [
            DeviceSpec(
                int(one["index"]), str(one["path"] or directory / "devices" / f"dev{one['index']}"), int(one["slots"])
            )
            for one in body
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise ProtocolError(f"the MDM's list of devices cannot be read: {error!r}") from None
    if len(specs) > DEVICES_MAX or len({spec.index for spec in specs}) != len(specs):
        raise ProtocolError("the MDM's list of devices is too long or names one twice")
    if any(spec.slots <= 0 for spec in specs):
        raise ProtocolError("the MDM tells of a device without slots")
    return specs


@dataclass
class Devices:
    """The devices of one SDS. ``open`` and ``make`` fill it; ``close`` gives back what the engine did not take."""

    directory: Path
    state: SdsState
    opened: dict[int, BlockDevice] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._log = get_logger("sds.devices")

    @property
    def incarnation(self) -> int:
        return max((device.incarnation for device in self.opened.values()), default=0)

    @property
    def durable_incarnation(self) -> int:
        """The youngest of the devices: what was acknowledged under an older one may be lost on that device."""
        return max((device.durable_incarnation for device in self.opened.values()), default=0)

    @property
    def unsure(self) -> bool:
        """One of them has lost track of what was in its slots: the MDM has to say what there may have been."""
        return any(device.unsure for device in self.opened.values())

    def describe(self) -> list[dict[str, Any]]:
        """As ``sds.register`` wants them."""
        return [
            {"index": index, "slots": device.slots, "device_id": device.device_id.hex()}
            for index, device in sorted(self.opened.items())
        ]

    def missing(self, told: Iterable[DeviceSpec]) -> list[DeviceSpec]:
        """Those that were never made."""
        known = {spec.index for spec in self.state.devices}
        return [spec for spec in told if spec.index not in known]

    def remember(self, **changes: Any) -> None:
        """Changes the state, durably."""
        self.state = replace(self.state, **changes)
        save_state(self.directory, self.state)

    def adopt(self, cluster_id: bytes, sds_id: int) -> None:
        """The MDM has said who we are. Raises ConflictError when the devices are somebody else's."""
        state = self.state
        if (state.cluster_id or cluster_id) != cluster_id:
            raise ConflictError(
                f"{self.directory} belongs to cluster {state.cluster_id.hex() if state.cluster_id else '?'}, "
                f"the MDM is of {cluster_id.hex()}"
            )
        if (state.sds_id or sds_id) != sds_id:
            raise ConflictError(f"{self.directory} belongs to SDS {state.sds_id}, the MDM takes it for SDS {sds_id}")
        if (state.cluster_id, state.sds_id) != (cluster_id, sds_id):
            self.remember(cluster_id=cluster_id, sds_id=sds_id)

    async def open(self) -> None:
        """Opens and recovers the listed devices; what is wrong with one goes to ``failed``."""
        await self._open_all(self.state.devices)

    async def make(self, specs: Iterable[DeviceSpec]) -> None:
        """Makes and opens devices that were never listed, then lists those that are whole."""
        specs = tuple(specs)
        await self._for_each(self._make, specs)
        await self._open_all([spec for spec in specs if spec.index not in self.failed])
        made = [spec for spec in specs if spec.index in self.opened]
        if made:
            self.remember(devices=(*self.state.devices, *made))

    async def close(self, *, clean: bool = True) -> None:
        """Marks the devices clean, if they are to be, and lets go of them. The engine must have stopped."""
        await self._for_each(self._close_clean if clean else self._close_as_is, tuple(self.opened.values()))
        self.opened.clear()

    async def unusable(self, index: int) -> str | None:
        """What keeps an opened device, which the engine has given up, from being opened again; None: nothing known."""
        device = self.opened[index]
        try:
            await trio.to_thread.run_sync(_probe, Path(device.path), device.device_id)
        except (OSError, ValueError) as error:
            return str(error) if isinstance(error, ValueError) else f"{error.filename or device.path}: {error.strerror}"
        return None

    async def _open_all(self, specs: Iterable[DeviceSpec]) -> None:
        await self._for_each(self._open, tuple(specs))
        if self.opened and self.state.sds_id is not None:
            # All devices serve under one incarnation, higher than any that one of them has had: some may have missed a
            # start.
            incarnation = self.incarnation
            for index, device in tuple(self.opened.items()):
                if not await self._attempt(index, device.path, device.set_sds, self.state.sds_id, incarnation):
                    device.close(clean=False)
                    del self.opened[index]

    async def _make(self, spec: DeviceSpec) -> None:
        def create() -> None:
            # There already, if we ended between making and listing it; then opening it tells whether it is ours.
            with contextlib.suppress(FileExistsError):
                BlockDevice.create(
                    spec.path,
                    cluster_id=self.state.cluster_id or b"",
                    sds_id=self.state.sds_id or 0,
                    index=spec.index,
                    size_bytes=spec.slots * CHUNK_SIZE_BYTES,
                )

        await self._attempt(spec.index, spec.path, create)

    async def _open(self, spec: DeviceSpec) -> None:
        def open_and_recover() -> None:
            device = BlockDevice.open(spec.path, cluster_id=self.state.cluster_id)
            try:
                if (device.index, device.slots) != (spec.index, spec.slots):
                    raise ValueError(
                        f"holds device {device.index} of {device.slots} slots "
                        f"where device {spec.index} of {spec.slots} is due"
                    )
                summary = device.recover()
            except BaseException:
                device.close(clean=False)
                raise
            self._log.info("device opened", path=spec.path, **{key: summary[key] for key in _SUMMARY})
            rot = {key: summary[key] for key in _ROT if summary[key]}
            if rot:
                self._log.error("device has rotted", path=spec.path, **rot)
            self.opened[spec.index] = device

        await self._attempt(spec.index, spec.path, open_and_recover)

    async def _close_clean(self, device: BlockDevice) -> None:
        await self._attempt(device.index, device.path, device.close)

    async def _close_as_is(self, device: BlockDevice) -> None:
        await self._attempt(device.index, device.path, partial(device.close, clean=False))

    async def _attempt(self, index: int, path: str, work: Callable[..., Any], *arguments: Any) -> bool:
        """Runs ``work`` in a thread; what it raises puts the device out of service, with its path and the reason."""
        try:
            await trio.to_thread.run_sync(work, *arguments)
        except (OSError, ValueError, MemoryError) as error:
            reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
            self.failed[index] = reason if path in reason else f"{path}: {reason}"
            self._log.error("device cannot be used", device=index, reason=self.failed[index])
            return False
        return True

    async def _for_each(self, work: Callable[[Any], Awaitable[None]], items: tuple[Any, ...]) -> None:
        limit = trio.CapacityLimiter(WORKING_MAX)

        async def one(item: Any) -> None:
            async with limit:
                await work(item)

        async with trio.open_nursery() as nursery:
            for item in items:
                nursery.start_soon(one, item)
