"""``python -m pfvol.sdc``: the daemon of one mount, started by ``pfvol mount`` (and by nothing else).

With ``--ready-fd`` it writes one line of JSON there (``{}`` when the mount answers, else ``{"error": ...}``) and closes
it. Ends when it is unmounted, or at SIGTERM or SIGINT; then it stops the embedded cluster if it is the last to need it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import trio

from pfvol.config import parse_address
from pfvol.errors import EXIT_BUG, Error, InternalError
from pfvol.log import configure, get_logger
from pfvol.sdc import daemon, records
from pfvol.sdc.options import parse_options


def main() -> int:
    arguments = _arguments()
    configure(level=arguments.log_level)
    ready = _Ready(arguments.ready_fd)
    daemon.prepare_process()
    code = 0
    try:
        trio.run(_run, arguments, ready)
    except BaseException as raised:
        error = _expected(raised)
        ready.tell(error.to_wire())
        code = error.exit_code
        get_logger(__name__).error("the mount has failed", reason=str(error), exc_info=code == EXIT_BUG)
        if arguments.ready_fd is None:
            print(f"pfvol: {error}", file=sys.stderr)
        if arguments.json:
            print(json.dumps({"error": error.to_wire()}, indent=2, default=str))
    finally:
        _end(arguments)
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pfvol.sdc", allow_abbrev=False)
    parser.add_argument("mountpoint")
    for name in ("--sdc", "--mdm", "--secret-file", "--data-dir", "--source"):
        parser.add_argument(name, required=True)
    parser.add_argument("-o", dest="options", default="")
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


class _Ready:
    """The pipe to whoever waits for the mount."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def tell(self, error: dict[str, Any] | None) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # Nobody waits any more.
                os.write(descriptor, json.dumps({} if error is None else {"error": error}).encode() + b"\n")
            os.close(descriptor)


async def _run(arguments: argparse.Namespace, ready: _Ready) -> None:
    spec = daemon.MountSpec(
        mountpoint=arguments.mountpoint,
        sdc=arguments.sdc,
        mdm=parse_address(arguments.mdm),
        secret_file=Path(arguments.secret_file),
        options=parse_options(arguments.options),
        source=arguments.source,
    )
    stopping = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_at_signal, signals, stopping)

            async def served(*, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
                await daemon.serve(spec, stopping, task_status=task_status)
                nursery.cancel_scope.cancel()

            await nursery.start(served)
            records.write(Path(arguments.data_dir), spec.mountpoint, spec.sdc)
            # What start-up left behind would be walked by every later collection, and nothing of it is garbage.
            gc.collect()
            gc.freeze()
            ready.tell(None)


async def _stop_at_signal(signals: Any, stopping: trio.Event) -> None:
    async for _ in signals:
        stopping.set()


def _expected(raised: BaseException) -> Error:
    """The one expected error in what was raised; anything else is a bug."""
    while isinstance(raised, BaseExceptionGroup) and len(raised.exceptions) == 1:
        raised = raised.exceptions[0]
    return raised if isinstance(raised, Error) else InternalError(f"the SDC has failed: {raised!r}")


def _end(arguments: argparse.Namespace) -> None:
    data_dir = Path(arguments.data_dir)
    try:
        records.remove(data_dir, arguments.mountpoint)
        records.stop_embedded_cluster(data_dir)
    except (Error, OSError) as error:
        get_logger(__name__).error("the embedded cluster may still run", reason=str(error))


if __name__ == "__main__":
    sys.exit(main())
