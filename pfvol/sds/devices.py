"""The devices of an SDS: made when the MDM says so, opened together, under one incarnation.

Owns ``<node directory>/sds.json`` (who this SDS is, its data port, the devices it has) and the devices' lifecycle outside
the engine. Assumes that one process works on a node directory (each device is locked). Promises: a device is listed in
sds.json only once it was made whole, and a listed one is never made again, so that a device that is lost shows as lost
and not as empty; what is wrong with a device is said with its path; the others are opened all the same.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import trio

from datapath.blockfile import BlockDevice
from pfvol.errors import ConfigError, Error, ProtocolError, VersionError
from pfvol.log import get_logger

STATE_FILE: Final = "sds.json"
STATE_FORMAT: Final = 1
DEVICES_MAX: Final = 1024
OPENING_MAX: Final = 4  # devices that are recovered at a time


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
    path = directory / STATE_FILE
    partial = directory / (STATE_FILE + ".new")
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(partial, "w") as file:
            json.dump(document, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


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

    def describe(self) -> list[dict[str, Any]]:
        """As ``sds.register`` wants them. None at all while one is out of service: see ``Sds._serve``."""
        return [
            {"index": index, "slots": device.slot_count, "device_id": device.device_id}
            for index, device in sorted(self.opened.items())
        ]

    def missing(self, told: Iterable[DeviceSpec]) -> list[DeviceSpec]:
        """Those that were never made."""
        known = {spec.index for spec in self.state.devices}
        return [spec for spec in told if spec.index not in known]
