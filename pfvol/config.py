"""The configuration of one node: a TOML file, each key of which can be given as PFVOL_<SECTION>_<KEY> instead.

Owns the list of keys, their types, defaults and checks. Pure but for reading the file: nothing here opens a port or
makes a directory. Every mistake is a ``ConfigError`` that names where it stands (file or variable), the key and what
was expected.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfvol.constants import (
    API_PORT_DEFAULT,
    CONTROL_PORT_DEFAULT,
    DATA_PORT_DEFAULT,
    NAME_LENGTH_MAX,
)
from pfvol.errors import ConfigError, InvalidError
from pfvol.ids import is_name

CAPABILITIES = ("mdm", "sds", "sdc")
CONFIG_FILE_BYTES_MAX = 1024 * 1024

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class NodeConfig:
    name: str
    capabilities: tuple[str, ...]
    data_dir: Path
    """The data directory of the cluster on this machine; the node's own is ``data_dir / name``."""
    bind: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    mdm: Address | None = None
    """The control address of the MDM; may be left out on the node that is the MDM."""
    secret_file: Path | None = None
    """None: ``secret`` in the data directory."""


@dataclass(frozen=True, slots=True)
class MdmConfig:
    """Port 0: any free one, chosen at the first start and kept."""

    control_port: int = CONTROL_PORT_DEFAULT
    api_port: int = API_PORT_DEFAULT


@dataclass(frozen=True, slots=True)
class SdsConfig:
    """Its devices are not told here: the MDM knows them (``sds add``)."""

    data_port: int = DATA_PORT_DEFAULT
    advertise: str | None = None
    """The host that others reach the data port at; None: the bound one."""


@dataclass(frozen=True, slots=True)
class SdcConfig:
    mountpoint: Path | None = None
    options: str = ""


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: str = "info"
    format: str = "console"
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Config:
    node: NodeConfig
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    mdm: MdmConfig = field(default_factory=MdmConfig)
    sds: SdsConfig = field(default_factory=SdsConfig)
    sdc: SdcConfig = field(default_factory=SdcConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def node_dir(self) -> Path:
        return self.node.data_dir / self.node.name

    @property
    def secret_file(self) -> Path:
        return self.cluster.secret_file or self.node.data_dir / "secret"


def default_data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """``PFVOL_DATA_DIR``, else /var/lib/pfvol for root and the user's state directory for others."""
    if given := environ.get("PFVOL_DATA_DIR"):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/pfvol")
    return Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "pfvol"


def load(path: Path | None, environ: Mapping[str, str] = os.environ, **overrides: Any) -> Config:
    """The configuration from a file (None: no file), the environment, and then overrides (``node_name=…``)."""
    return parse(_read(path) if path else {}, environ, source=str(path or "configuration"), overrides=overrides)


def parse(
    document: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    source: str,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration out of a parsed TOML document; source is what errors call it."""
    values = _collect(document, environ, source, {k: v for k, v in (overrides or {}).items() if v is not None})
    node = values["node"]
    for key in ("name", "capabilities"):
        if key not in node:
            raise ConfigError(f"{source}: [node] {key} is missing (or give PFVOL_NODE_{key.upper()})")
    node.setdefault("data_dir", default_data_dir(environ))
    config = Config(
        NodeConfig(**node),
        ClusterConfig(**values["cluster"]),
        MdmConfig(**values["mdm"]),
        SdsConfig(**values["sds"]),
        SdcConfig(**values["sdc"]),
        LogConfig(**values["log"]),
    )
    if config.cluster.mdm is None and "mdm" not in config.node.capabilities:
        raise ConfigError(f'{source}: [cluster] mdm is missing: "host:port" of the MDM\'s control port')
    return config


def parse_address(text: str) -> Address:
    """``host:port`` or ``[v6]:port``; raises ``InvalidError``."""
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidError(f'{text!r} is not an address: expected "host:port"')
    return host, int(port)


def format_address(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_name(text: str) -> str:
    """A legal name for a node or an object; raises ``InvalidError``."""
    if not is_name(text):
        raise InvalidError(
            f"{text!r} is not a name: 1 to {NAME_LENGTH_MAX} of A-Z a-z 0-9 _ . -, not starting with . or -,"
            " and not 16 hex digits"
        )
    return text


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > CONFIG_FILE_BYTES_MAX:
        raise ConfigError(f"{path} is too large for a configuration file")
    try:
        return tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _collect(
    document: Mapping[str, Any], environ: Mapping[str, str], source: str, overrides: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {section: {} for section in _KEYS}
    for section, entries in document.items():
        if section not in _KEYS:
            raise ConfigError(f"{source}: there is no section [{section}]; sections are {', '.join(_KEYS)}")
        if not isinstance(entries, dict):
            raise ConfigError(f"{source}: [{section}] must be a table")
        for key, value in entries.items():
            values[section][key] = _convert(section, key, value, f"{source}: [{section}] {key}")
    for section, keys in _KEYS.items():
        for key in keys:
            variable = f"PFVOL_{section}_{key}".upper()
            if variable in environ:
                values[section][key] = _convert(section, key, environ[variable], variable)
    for name, value in overrides.items():
        section, _, key = name.partition("_")
        values[section][key] = _convert(section, key, value, f"[{section}] {key}")
    return values


def _convert(section: str, key: str, value: Any, where: str) -> Any:
    known = _KEYS[section]
    if key not in known:
        raise ConfigError(f"{where}: there is no such key; [{section}] has {', '.join(known)}")
    try:
        return known[key](value)
    except (InvalidError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a text, not {value!r}")
    return value


def _any_text(value: Any) -> str:
    return value if value == "" else _text(value)


def _path(value: Any) -> Path:
    return value.absolute() if isinstance(value, Path) else Path(_text(value)).expanduser().absolute()


def _optional_path(value: Any) -> Path | None:
    return None if value == "" else _path(value)


def _name(value: Any) -> str:
    return check_name(_text(value))


def _address(value: Any) -> Address | None:
    return None if value == "" else parse_address(_text(value))


def _capabilities(value: Any) -> tuple[str, ...]:
    names = _list(value)
    unknown = [name for name in names if name not in CAPABILITIES]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(f"expected some of {', '.join(CAPABILITIES)}, each once, not {value!r}")
    return tuple(name for name in CAPABILITIES if name in names)


def _list(value: Any) -> list[str]:
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"expected a list of texts, not {value!r}")
    return [part for part in parts if part]


def _integer(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"expected a whole number, not {value!r}")
    return value


def _port(value: Any) -> int:
    port = _integer(value)
    if not 0 <= port < 65536:
        raise ValueError(f"expected a port from 0 (any) to 65535, not {value!r}")
    return port


_KEYS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "node": {"name": _name, "capabilities": _capabilities, "data_dir": _path, "bind": _text},
    "cluster": {"mdm": _address, "secret_file": _optional_path},
    "mdm": {"control_port": _port, "api_port": _port},
    "sds": {"data_port": _port, "advertise": _text},
    "sdc": {"mountpoint": _optional_path, "options": _any_text},
    "log": {"level": _text, "format": _text, "file": _optional_path},
}
