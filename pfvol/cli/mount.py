"""``pfvol mount`` and ``pfvol umount``: the volumes of an SDC as files, and away again."""

from __future__ import annotations

import os
import socket
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pfvol.cli.context import Settings, settings
from pfvol.client import Client, Endpoint, read_cluster
from pfvol.constants import VOLUME_SIZE_BYTES_DEFAULT
from pfvol.errors import ConfigError, InvalidError
from pfvol.ids import is_name

FIRST_VOLUME = "vol1"
FIRST_POOL = "default"
SECRET_FILE = "secret"

MountpointArgument = Annotated[str, typer.Argument(metavar="MOUNTPOINT", help="A directory.", show_default=False)]


@dataclass(frozen=True)
class _Cluster:
    """The cluster a mount is of; ``source`` is what df(1) shows for it."""

    mdm: str
    secret_file: Path
    source: str


def mount(
    ctx: typer.Context,
    mountpoint: MountpointArgument,
    sdc: Annotated[
        str | None, typer.Option("--sdc", metavar="NAME", help="This mount's SDC (default: the machine's name).")
    ] = None,
    foreground: Annotated[bool, typer.Option("--foreground", "-f", help="Stay, and log to stderr.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option("-o", metavar="OPTIONS", help="direct, ro, allow_other, default_permissions, io_deadline=SECONDS"),
    ] = None,
) -> None:
    """Show the volumes mapped to an SDC as files under MOUNTPOINT.

    Without --mdm and without a configured cluster, the cluster in the data dir is started: it stops with the unmount.
    """
    from pfvol.sdc import launch, records
    from pfvol.sdc import mount as kernel
    from pfvol.sdc.options import parse_options

    cli = settings(ctx)
    options = parse_options(",".join(option or []))
    data_dir = Path(options.data_dir).absolute() if options.data_dir else cli.data_dir.absolute()
    name = sdc or options.sdc or launch.default_sdc_name(socket.gethostname())
    if not is_name(name):
        raise InvalidError(f"{name!r} cannot be an SDC's name: 1 to 31 of A-Z a-z 0-9 _ . -, and not an id")
    path = kernel.resolve(mountpoint)
    kernel.check_system()
    kernel.check_mountpoint(path)
    cluster = _configured(cli, options.mdm, data_dir)
    try:
        with records.locked(data_dir):
            launch.check_free(data_dir, name)
            if cluster is None:
                cluster = _start_embedded(cli, data_dir, name)
            spec = launch.Launch(
                mountpoint=path,
                sdc=name,
                mdm=cluster.mdm,
                secret_file=cluster.secret_file,
                data_dir=data_dir,
                options=options,
                source=cluster.source,
                log_level="debug" if cli.out.verbose else "info",
            )
            pid = 0 if foreground else launch.start(spec)
        if foreground:
            launch.run_in_foreground(spec, json_errors=cli.out.json)
    except BaseException:
        records.stop_embedded_cluster(data_dir)
        raise
    _say(cli, path, name, pid)


def umount(ctx: typer.Context, mountpoint: MountpointArgument) -> None:
    """Unmount MOUNTPOINT when its dirty data has been written."""
    from pfvol.sdc import launch
    from pfvol.sdc import mount as kernel

    cli = settings(ctx)
    path = kernel.resolve(mountpoint)
    launch.stop(cli.data_dir.absolute(), path)
    cli.out.done({"mountpoint": path}, f"{path} unmounted")


def _configured(cli: Settings, mdm: str | None, data_dir: Path) -> _Cluster | None:
    """The cluster that the options name; None where the one in the data dir is meant."""
    mdm = mdm or cli.mdm
    local = read_cluster(data_dir)
    if mdm is None and cli.api is not None:
        if local is None or str(local["api"]).rstrip("/") != cli.api.rstrip("/"):
            raise ConfigError("a mount speaks to the MDM and not to the REST API: give --mdm HOST:PORT too")
        mdm = str(local["mdm"])
    if mdm is None and cli.config is not None:
        return _of_config(cli.config)
    if mdm is None:
        return None
    if local is not None and local.get("mdm") == mdm:
        return _of_data_dir(local, data_dir)
    return _Cluster(mdm, data_dir / SECRET_FILE, f"pfvol:{mdm}")


def _of_data_dir(document: dict[str, Any], data_dir: Path) -> _Cluster:
    return _Cluster(str(document["mdm"]), data_dir / SECRET_FILE, f"pfvol:{data_dir}")


def _of_config(path: Path) -> _Cluster:
    """What a node's configuration file says of its cluster."""
    try:
        body = tomllib.loads(path.read_text())
        mdm = str(body["cluster"]["mdm"])
        secret_file = Path(body["cluster"]["secret_file"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot use configuration file {path}: [cluster] mdm and secret_file: {error}") from error
    return _Cluster(mdm, secret_file, f"pfvol:{mdm}")


def _start_embedded(cli: Settings, data_dir: Path, sdc: str) -> _Cluster:
    """The data dir's cluster, running. Started here it belongs to its mounts: the last of them stops it."""
    from pfvol import localcluster
    from pfvol.sdc import records

    mark = records.embedded_mark(data_dir)
    if read_cluster(data_dir) is None:
        running = False
    else:
        running = any(node["state"] != "STOPPED" for node in localcluster.status(data_dir)["nodes"])
    if running and not records.live(data_dir):
        mark.unlink(missing_ok=True)  # Of an earlier time: whoever started it since wants it to stay.
    if not running:
        cli.out.note(f"starting the cluster in {data_dir}")
        mark.touch()
        localcluster.up(data_dir)
    document = read_cluster(data_dir)
    assert document is not None
    if mark.exists():
        with Client(Endpoint(document["api"], document["token"])) as api:
            _make_first_volume(api, sdc)
    return _of_data_dir(document, data_dir)


def _make_first_volume(api: Client, sdc: str) -> None:
    """An embedded cluster without a volume gets one, mapped to its first mount."""
    if api.get("/vol/list"):
        return
    body = {
        "pool_id": FIRST_POOL,
        "name": FIRST_VOLUME,
        "size_bytes": VOLUME_SIZE_BYTES_DEFAULT,
        "provisioning": "thin",
    }
    volume = api.post("/vol/create", **body)
    if sdc not in {row["name"] for row in api.get("/sdc/list")}:
        api.post("/sdc/add", name=sdc)
    api.post("/vol/map", volume_id=volume["id"], sdc_id=sdc, access_mode="readWrite")


def _say(cli: Settings, path: str, sdc: str, pid: int) -> None:
    volumes = sorted(os.listdir(path))
    cli.out.done({"mountpoint": path, "sdc": sdc, "pid": pid, "volumes": volumes}, f"mounted at {path} as SDC {sdc}")
    if not volumes:
        cli.out.note(f"no volume is mapped to SDC {sdc} yet: `pfvol vol map VOL {sdc}` makes one appear at once")
